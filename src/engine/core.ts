// Owns the engine's loop body: plan a step, run it, sample, tell. It has no thread and no clock of
// its own, so that it runs the same in a worker, in a test and in a simulation.
//
// Newcomers start at `step`.

import { present } from '../assert.ts'
import { LatticeError } from '../errors.ts'
import { EVICTION_DEFAULT } from '../kv/eviction.ts'
import { KvHistory, watched } from '../kv/history.ts'
import { type KvMap, kvMap } from '../kv/map.ts'
import { PrefixCache } from '../kv/prefix.ts'
import { RegionTable } from '../kv/regions.ts'
import { SlotTable } from '../kv/slots.ts'
import { Transfers } from '../kv/transfers.ts'
import { KV_MAPPINGS_MAX } from '../limits.ts'
import { Costs } from '../scheduler/costs.ts'
import { type ScheduledPart, Scheduler } from '../scheduler/scheduler.ts'
import { type Backend, StepBatch } from '../backends/backend.ts'
import type {
  EngineAnswers,
  EngineQuestion,
  EngineSnapshot,
  FinishReason,
  SamplingParams,
  SequenceRequest,
  TokenLogprobs,
} from './api.ts'
import { type Flight, StepsAhead, workOf } from './ahead.ts'
import { BeamGroup } from './beam-group.ts'
import type { Hypothesis } from './beams.ts'
import type { CoreOptions, CoreSink } from './core-options.ts'
import { Offload } from './offload.ts'
import { Sampler } from './sampler.ts'
import { Sequence } from './sequence.ts'
import { Sessions } from './sessions.ts'
import { PromptSharing } from './sharing.ts'
import { EngineCounts, snapshotOf } from './snapshot.ts'

export type { CoreOptions, CoreSink } from './core-options.ts'

/**
 * How long the pages of an ended sequence wait for one that overwrites them. Longer than the gap
 * between a client's requests in a closed loop; short, because idle memory must be back with the
 * kernel within 100 ms and the kernel takes 50 ms a GiB.
 */
const WARM_MS = 20

/** How soon to look again for what is on its way, when there is nothing else to do. */
const TIER_WAIT_MS = 1

/** An idle engine keeps no more than this warm; the rest goes back at once. */
const WARM_IDLE_BYTES = 64 << 20

export class EngineCore {
  private readonly backend: Backend
  private readonly sink: CoreSink
  private readonly now: () => number
  private readonly slots: SlotTable
  private readonly sharing: PromptSharing
  private readonly history: KvHistory
  private readonly scheduler: Scheduler<Sequence>
  private readonly offload: Offload | undefined
  private readonly sessions: Sessions | undefined
  private readonly costs: Costs
  private readonly sequences = new Map<number, Sequence>()
  /** Regions besides its own that a slot's tokens may lie in. */
  private readonly spansMax: number
  private readonly ahead: StepsAhead | undefined
  private landedMs = -Infinity
  private readonly batch: StepBatch
  private readonly sampler: Sampler
  /** A row of logits, for another sequence to sample from. */
  private readonly row: Float32Array
  private readonly counts = new EngineCounts()

  /** @param now milliseconds that never go back. */
  constructor(backend: Backend, options: CoreOptions, sink: CoreSink, now: () => number) {
    this.backend = backend
    this.sink = sink
    this.now = now
    const { kv, chunkTokensMin } = backend
    this.history = new KvHistory(now)
    const mover = watched(kv, kv.layout, this.history)
    const regions = new RegionTable(kv.layout, kv.regions, options.kvPages, mover)
    this.slots = new SlotTable(regions, kv.slots)
    this.spansMax = Math.max(1, Math.floor(KV_MAPPINGS_MAX / (kv.slots * kv.layout.ranges)) - 1)
    const { prefixPages, prefixEviction: eviction = EVICTION_DEFAULT } = options
    const { pageBytes } = kv.layout.shape
    const onEvict = (pages: number): void => this.history.add('evict', pages * pageBytes)
    const transfers = kv.tier && new Transfers(kv.tier)
    const places = transfers && { places: transfers.places }
    const cache = prefixPages
      ? new PrefixCache(regions, prefixPages, { eviction, now, onEvict, ...places })
      : undefined
    this.costs = new Costs(kv.layout.shape.pageBytes)
    this.offload =
      transfers && new Offload(transfers, this.slots, cache, this.costs, options, kv.tier?.store)
    this.sessions = cache && new Sessions(this.slots, cache, this.offload)
    this.sharing = new PromptSharing(this.slots, cache, this.offload, {
      output: options.prefixOutput ?? false,
      onPreempt: (pages) => this.history.add('preempt', pages * pageBytes),
      computeMin: Math.max(1, chunkTokensMin),
      spansMax: this.spansMax,
    })
    const { maxSequences, greedy = false } = options
    this.scheduler = new Scheduler(
      this.slots,
      { stepTokens: backend.stepTokensMax, maxSequences, chunkTokensMin, greedy },
      this.sharing,
      this.offload,
    )
    this.ahead = backend.chooser && new StepsAhead(backend, backend.chooser)
    this.batch = new StepBatch(backend.stepTokensMax, options.maxSequences)
    this.sampler = new Sampler(backend.vocab)
    this.row = new Float32Array(backend.vocab)
  }

  get idle(): boolean {
    return this.sequences.size === 0 && !this.ahead?.flight
  }

  /** Takes a sequence in; its first token comes from a later step. */
  submit(id: number, request: SequenceRequest): void {
    this.submitChoices([id], request, [request.sampling])
  }

  /** Takes in sequences that differ in their sampling only: their prompt is computed once. */
  submitChoices(
    ids: readonly number[],
    request: SequenceRequest,
    samplings: readonly SamplingParams[],
  ): void {
    if (request.beams) return this.submitBeams(ids, request)
    const group: Sequence[] = []
    ids.forEach((id, i) => {
      try {
        this.sharing.checkPin(request)
        const sampling = present(samplings[i], 'sampling of a choice')
        const sequence = new Sequence(id, { ...request, sampling }, group, this.now())
        group.push(sequence)
        this.sequences.set(id, sequence)
        this.scheduler.waiting.push(sequence)
      } catch (thrown) {
        if (!(thrown instanceof LatticeError)) throw thrown
        this.report(id, 'error', 0, thrown)
      }
    })
  }

  abort(id: number): void {
    const sequence = this.sequences.get(id)
    if (!sequence) return
    const { unit } = sequence
    if (!unit) return this.finish(sequence, 'abort')
    unit.ids[unit.ids.indexOf(id)] = undefined
    this.report(id, 'abort', 0)
    if (unit.abandoned) this.endBeams(unit, -Infinity)
  }

  /**
   * Runs one step: every decoding sequence gains a token and prompts advance by a chunk.
   * @returns false if there was nothing to do, or all wait for what comes from outside of memory.
   * @throws what the backend throws; then the core is of no more use.
   */
  step(): boolean {
    const start = this.now()
    this.scheduler.settle(start)
    this.offload?.keepRoom()
    this.offload?.keep(start)
    const parts = this.scheduler.plan()
    if (parts.length === 0 && !this.ahead?.flight) return false
    if (this.ahead) this.stepAhead(this.ahead, parts)
    else this.stepAlone(parts)
    this.releaseOverdue()
    this.counts.stepMs += this.now() - start
    return true
  }

  /** A step from its launch to its tokens. */
  private stepAlone(parts: readonly ScheduledPart<Sequence>[]): void {
    this.fill(parts)
    const start = this.now()
    this.backend.launch(this.batch)
    this.expectGrowth(parts)
    const rows = this.backend.collect()
    // What a step read after the pager's death is not what was there: nothing of it is told.
    this.backend.kv.tier?.check()
    const ms = this.now() - start
    this.costs.stepped(workOf(parts), ms)
    this.commit(parts, rows)
    this.counts.stepped(ms)
  }

  /** Queues a step, then takes in the one before it: while this runs, that one computes. */
  private stepAhead(ahead: StepsAhead, parts: readonly ScheduledPart<Sequence>[]): void {
    const before = ahead.take()
    if (parts.length > 0) {
      this.fill(parts)
      ahead.launch(parts, this.batch, this.now())
      this.expectGrowth(parts)
      for (const { sequence, count } of parts) this.goOn(ahead, sequence, count)
    }
    if (before) this.land(ahead, before)
    if (ahead.flight?.hosted) this.land(ahead, present(ahead.take(), 'a step'))
  }

  /** A sequence's tokens are as good as computed: whoever is planned next follows them. */
  private goOn(ahead: StepsAhead, sequence: Sequence, count: number): void {
    const first = sequence.length === sequence.promptLength
    sequence.computed += count
    if (first) this.counts.promptTokens += count
    if (sequence.computed < sequence.length) return
    if (first && !this.keepPrompt(sequence)) return
    if (!ahead.isHosted(sequence)) sequence.pushUnknown()
  }

  /** Waits for a step that was queued, and takes its tokens in. */
  private land(ahead: StepsAhead, flight: Flight): void {
    const rows = ahead.wait(flight)
    this.backend.kv.tier?.check()
    const now = this.now()
    const ms = now - Math.max(flight.startMs, this.landedMs)
    this.landedMs = now
    this.costs.stepped(flight.work, ms)
    this.counts.stepped(ms)
    flight.awaited.forEach(({ sequence, position }, output) => {
      const { id, unit } = sequence
      const row = rows[output]
      if (unit) this.advanceBeam(unit, sequence, present(row, 'a row of logits'))
      else if (this.sequences.get(id) !== sequence) return
      else if (position < 0) this.advance(sequence, present(row, 'a row of logits'))
      else this.takeIn(sequence, present(sequence.tokens[position], 'a token'))
    })
  }

  /** The first unknown token of a sequence is known. */
  private takeIn(sequence: Sequence, token: number): void {
    if (token < 0) return this.finish(sequence, 'error', notANumber())
    sequence.unknown--
    this.tell(sequence, token, undefined)
  }

  /**
   * Gives back pages of sequences that ended, slot by slot: called again and again while there is
   * nothing else to do, it holds up a sequence that arrives by a millisecond, not by all of them.
   * @returns milliseconds until there is more to give back, or undefined if there is nothing.
   */
  settle(): number | undefined {
    const wait = this.giveBack()
    this.offload?.keepRoom()
    const keep = this.offload?.keep(this.now())
    if (!this.offload?.busy) return keep === undefined ? wait : Math.min(wait ?? Infinity, keep)
    if (this.idle) this.scheduler.settle(this.now())
    return Math.min(wait ?? Infinity, TIER_WAIT_MS)
  }

  private giveBack(): number | undefined {
    const bytes = this.slots.warmPages * this.backend.kv.layout.shape.pageBytes
    if (this.idle && bytes > WARM_IDLE_BYTES) {
      this.slots.reclaim(Infinity)
      return 0
    }
    this.releaseOverdue()
    const { warmSinceMs } = this.slots
    const warm = warmSinceMs === undefined ? Infinity : warmSinceMs + WARM_MS - this.now()
    const idle = this.backend.kv.settle?.(this.now()) ?? Infinity
    const wait = Math.min(warm, idle)
    return wait === Infinity ? undefined : Math.max(0, wait)
  }

  /** Throws if the account of memory contradicts itself. */
  check(): void {
    this.offload?.check()
    this.sharing.check(this.offload?.holds())
  }

  /** The machine has too little memory: cached prefixes go out of it. */
  relieve(): void {
    this.offload?.relieve()
  }

  snapshot(): EngineSnapshot {
    const { backend, slots, scheduler, sharing, offload, counts } = this
    return snapshotOf({ kv: backend.kv, slots, scheduler, sharing, offload, counts }, this.now())
  }

  /** Answers what was asked, or does what was told, between two steps. */
  answer<Q extends EngineQuestion>(question: Q): EngineAnswers[Q['kind']]
  answer(question: EngineQuestion): EngineAnswers[keyof EngineAnswers] {
    const { kind } = question
    if (kind === 'map') return { snapshot: this.snapshot(), map: this.map() }
    const { tenant } = question
    if (kind === 'pinned') return this.sharing.pinned(this.now(), tenant)
    if (kind === 'unpin') return this.sharing.unpin(tenant, question.id)
    if (kind === 'sessions') return this.sessions?.list(tenant, this.now()) ?? []
    if (kind === 'offload') return this.sessions?.moveOut(tenant, question.id) ?? 'unknown'
    return this.sessions?.moveIn(tenant, question.id) ?? 'unknown'
  }

  private map(): KvMap {
    const { slots, history, scheduler } = this
    return kvMap(slots, this.sharing.cache, history, scheduler.running, this.now())
  }

  private fill(parts: readonly ScheduledPart<Sequence>[]): void {
    this.batch.clear()
    for (const { sequence, count } of parts) {
      const { slot, computed, tokens, length } = sequence
      this.start(sequence)
      this.batch.add(slot, computed, tokens, computed, count, computed + count === length)
    }
  }

  /** While a step computes, memory can be made ready for the next. */
  private expectGrowth(parts: readonly ScheduledPart<Sequence>[]): void {
    const { maxTokens } = this.backend.kv.layout.shape
    for (const { sequence, count } of parts) {
      const after = sequence.computed + count
      const chunk = Math.min(sequence.length - after, this.backend.stepTokensMax)
      this.slots.expect(sequence.slot, Math.min(after + Math.max(1, chunk), maxTokens))
    }
  }

  private commit(parts: readonly ScheduledPart<Sequence>[], rows: readonly Float32Array[]): void {
    let row = 0
    for (const { sequence, count } of parts) {
      sequence.computed += count
      if (sequence.outputTokens === 0) this.counts.promptTokens += count
      if (sequence.computed < sequence.length) continue
      const logits = present(rows[row++], 'a row of logits')
      if (sequence.outputTokens === 0 && !this.share(sequence, logits)) continue
      if (sequence.unit) this.advanceBeam(sequence.unit, sequence, logits)
      else this.advance(sequence, logits)
    }
  }

  /**
   * A prompt is in memory: it is kept for later, and others that wait for it start from here.
   * False if it was to be pinned and could not be: then the sequence has ended.
   */
  private share(sequence: Sequence, logits: Float32Array): boolean {
    if (!this.keepPrompt(sequence)) return false
    for (;;) {
      const next = this.scheduler.waiting[0]
      if (!next || !this.sharing.continues(next, sequence)) return true
      if (!this.scheduler.fork(sequence)) return true
      this.start(next)
      // Sampling changes the logits that it samples from.
      this.row.set(logits)
      this.advance(next, this.row)
    }
  }

  private keepPrompt(sequence: Sequence): boolean {
    try {
      this.sharing.computed(sequence)
    } catch (thrown) {
      const full = thrown instanceof LatticeError && thrown.code === 'prefix_memory_exhausted'
      if (!full) throw thrown
      this.finish(sequence, 'error', thrown)
      return false
    }
    return true
  }

  private start(sequence: Sequence): void {
    if (sequence.started) return
    this.sharing.started(sequence)
    sequence.started = true
    for (const id of sequence.unit?.ids ?? [sequence.id]) {
      if (id !== undefined) this.sink.onStart(id, sequence.cachedTokens)
    }
  }

  /** Samples a sequence's next token and ends it if that was the last. */
  private advance(sequence: Sequence, logits: Float32Array): void {
    const { topLogprobs } = sequence.request
    let token: number
    try {
      token = this.sampler.sample(logits, sequence.sampler)
    } catch (thrown) {
      if (!(thrown instanceof LatticeError)) throw thrown
      return this.finish(sequence, 'error', thrown)
    }
    sequence.push(token)
    const logprobs =
      topLogprobs === undefined ? undefined : this.sampler.logprobs(logits, token, topLogprobs)
    sequence.logprobs += logprobs?.logprob ?? 0
    this.tell(sequence, token, logprobs)
  }

  /** A sequence has a new token, which may be its last. */
  private tell(sequence: Sequence, token: number, logprobs: TokenLogprobs | undefined): void {
    const { stopTokens, maxTokens } = sequence.request
    this.counts.outputTokens++
    if (stopTokens.includes(token)) return this.finish(sequence, 'stop')
    this.sink.onToken(sequence.id, token, logprobs)
    if (sequence.outputTokens === maxTokens) this.finish(sequence, 'length')
  }

  private finish(sequence: Sequence, reason: FinishReason, error?: LatticeError): void {
    sequence.dropUnknown()
    if (sequence.slot >= 0 && reason !== 'error') this.sharing.ended(sequence)
    // After an abort nobody is likely to follow in its place: the pages go back within a step.
    this.scheduler.remove(sequence, reason === 'abort' ? -Infinity : this.now())
    const { id, outputTokens, logprobs, request } = sequence
    const scored = request.topLogprobs !== undefined && outputTokens > 0
    this.report(id, reason, outputTokens, error, scored ? logprobs / outputTokens : undefined)
  }

  private report(
    id: number,
    reason: FinishReason,
    outputTokens: number,
    error?: LatticeError,
    score?: number,
  ): void {
    this.sequences.delete(id)
    this.counts.finished[reason]++
    this.sink.onFinish(id, reason, outputTokens, error, score)
  }

  private submitBeams(ids: readonly number[], request: SequenceRequest): void {
    try {
      const group = new BeamGroup(ids, request, this.backend.kv.layout, this.now())
      this.scheduler.checkUnit(group)
      for (const id of ids) this.sequences.set(id, group.lead)
      this.scheduler.waiting.push(group.lead)
    } catch (thrown) {
      if (!(thrown instanceof LatticeError)) throw thrown
      for (const id of ids) this.report(id, 'error', 0, thrown)
    }
  }

  /** Takes a beam's logits in; once those of all are there, their search goes on by a token. */
  private advanceBeam(group: BeamGroup, member: Sequence, logits: Float32Array): void {
    if (group.abandoned) return
    try {
      if (!group.offer(member, logits, this.sampler)) return
      const hypotheses = group.advance(this.scheduler, this.spansMax)
      if (hypotheses) this.deliver(group, hypotheses)
    } catch (thrown) {
      if (!(thrown instanceof LatticeError)) throw thrown
      this.endBeams(group, -Infinity, thrown)
    }
  }

  /** Hands out what a beam search has found, the best to its first choice. */
  private deliver(group: BeamGroup, hypotheses: readonly Hypothesis[]): void {
    const { topLogprobs } = group.lead.request
    hypotheses.forEach(({ tokens, logprobs, score, stopped }, i) => {
      const id = group.ids[i]
      if (id === undefined) return
      const shown = stopped ? tokens.slice(0, -1) : tokens
      shown.forEach((token, at) => {
        this.sink.onToken(id, token, topLogprobs === undefined ? undefined : logprobs[at])
      })
      this.counts.outputTokens += tokens.length
      group.ids[i] = undefined
      this.report(id, stopped ? 'stop' : 'length', tokens.length, undefined, score)
    })
    this.endBeams(group, this.now(), tooFew(hypotheses.length))
  }

  /** Takes all beams out; who still waits for a hypothesis gets the error. */
  private endBeams(group: BeamGroup, sinceMs: number, error?: LatticeError): void {
    const running = this.scheduler.running.filter(({ unit }) => unit === group)
    for (const member of new Set([...running, group.lead])) this.scheduler.remove(member, sinceMs)
    group.ids.forEach((id, i) => {
      if (id === undefined) return
      group.ids[i] = undefined
      this.report(id, 'error', 0, error)
    })
  }

  /** Gives back the pages of all aborted sequences, and of one that ended a while ago. */
  private releaseOverdue(): void {
    while (this.slots.reclaim(-Infinity) >= 0);
    this.slots.reclaim(this.now() - WARM_MS)
  }
}

function notANumber(): LatticeError {
  return new LatticeError('backend_failed', 'A logit is not a number.', {
    todo: 'Check the model file; `lattice inspect` reads it.',
  })
}

function tooFew(found: number): LatticeError {
  return new LatticeError('invalid_request', `The beam search found only ${found} answers.`, {
    todo: 'Ask for fewer answers: there are not as many that are possible.',
    details: { param: 'n' },
  })
}
