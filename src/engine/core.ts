// Owns the engine's loop body: plan a step, run it, sample, tell. It has no thread and no clock of
// its own, so that it runs the same in a worker, in a test and in a simulation.
//
// Newcomers start at `step`.

import { present } from '../assert.ts'
import { type ErrorCode, LatticeError } from '../errors.ts'
import type { KvHistory } from '../kv/history.ts'
import { type KvMap, kvMap } from '../kv/map.ts'
import type { SlotTable } from '../kv/slots.ts'
import type { Costs } from '../scheduler/costs.ts'
import { isDecoding, type ScheduledPart, Scheduler } from '../scheduler/scheduler.ts'
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
import { answerOf } from './answers.ts'
import { type Flight, notANumber, StepsAhead, workOf } from './ahead.ts'
import { BeamGroup, beamsFork, tooFew } from './beam-group.ts'
import type { Hypothesis } from './beams.ts'
import type { CoreOptions, CoreSink } from './core-contract.ts'
import { engineMemory, giveBack, releaseOverdue } from './memory.ts'
import type { Offload } from './offload.ts'
import { sequenceEnded } from './messages.ts'
import { Sampler } from './sampler.ts'
import { Sequence } from './sequence.ts'
import type { Sessions } from './sessions.ts'
import type { PromptSharing } from './sharing.ts'
import { memoryTaken, Shortage } from './shortage.ts'
import { EngineCounts, snapshotOf } from './snapshot.ts'

/** How soon to look again for what is on its way, when there is nothing else to do. */
const TIER_WAIT_MS = 1

/** How soon to look again whether what shall outlive the process can be written. */
const KEEP_WAIT_MS = 50

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
  private readonly shortage: Shortage | undefined
  private landedMs = -Infinity
  private readonly batch: StepBatch
  private readonly sampler: Sampler
  /** A row of logits, for another sequence to sample from. */
  private readonly row: Float32Array
  private readonly counts = new EngineCounts()
  private keptMs = 0

  /** @param now milliseconds that never go back. */
  constructor(backend: Backend, options: CoreOptions, sink: CoreSink, now: () => number) {
    this.backend = backend
    this.sink = sink
    this.now = now
    const memory = engineMemory(backend, options, now)
    this.slots = memory.slots
    this.spansMax = memory.spansMax
    this.history = memory.history
    this.costs = memory.costs
    this.offload = memory.offload
    this.sessions = memory.sessions
    this.sharing = memory.sharing
    const { chunkTokensMin } = backend
    const { maxSequences, greedy = false } = options
    this.scheduler = new Scheduler(
      this.slots,
      { stepTokens: backend.stepTokensMax, maxSequences, chunkTokensMin, greedy },
      this.sharing,
      this.offload,
    )
    const { contended } = backend.kv
    this.shortage = contended && new Shortage(contended, this.slots, this.scheduler)
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

  /** Takes in a sequence that begins with the tokens that another one has now. */
  fork(parent: number, id: number, sampling: SamplingParams): void {
    try {
      // Its tokens are to be known.
      if (this.ahead?.flight) this.land(this.ahead, present(this.ahead.take(), 'a step'))
      const source = this.sequences.get(parent)
      if (!source) throw sequenceEnded()
      if (source.unit) throw beamsFork()
      const fork = source.fork(id, sampling, this.now())
      const { group } = source
      group.splice(0, Infinity, ...group.filter((one) => this.sequences.has(one.id)), fork)
      this.sequences.set(id, fork)
      const decodes = source.slot >= 0 && isDecoding(source)
      if (!decodes || !this.sharing.spreads(source) || !this.scheduler.fork(fork, source)) {
        this.scheduler.waiting.push(fork)
      }
    } catch (thrown) {
      if (!(thrown instanceof LatticeError)) throw thrown
      this.report(id, 'error', 0, thrown)
    }
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
    this.shortage?.look(start)
    const planned = this.scheduler.plan()
    const parts = this.shortage?.sift(planned) ?? planned
    // After the plan: what has just come back for a sequence must not go before that begins.
    this.offload?.keepRoom()
    if (start - this.keptMs > KEEP_WAIT_MS) this.keep()
    if (parts.length === 0 && !this.ahead?.flight) return this.giveUpStuck()
    if (this.ahead) this.stepAhead(this.ahead, parts)
    else this.stepAlone(parts)
    releaseOverdue(this.slots, this.now())
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
      else this.takeIn(sequence, position, ahead.logprobsOf(flight, output, sequence))
    })
  }

  /** The first unknown token of a sequence is known. */
  private takeIn(sequence: Sequence, position: number, logprobs: TokenLogprobs | undefined): void {
    const token = present(sequence.tokens[position], 'a token')
    if (token < 0) return this.finish(sequence, 'error', notANumber())
    sequence.unknown--
    this.tell(sequence, token, logprobs)
  }

  /**
   * Gives back pages of sequences that ended, slot by slot: called again and again while there is
   * nothing else to do, it holds up a sequence that arrives by a millisecond, not by all of them.
   * @returns milliseconds until there is more to give back, or undefined if there is nothing.
   */
  settle(): number | undefined {
    const wait = giveBack(this.slots, this.backend.kv, this.idle, this.now(), this.shortage)
    this.offload?.keepRoom()
    this.keep()
    if (!this.offload?.busy) {
      return this.offload?.keeping ? Math.min(wait ?? Infinity, KEEP_WAIT_MS) : wait
    }
    if (this.idle) this.scheduler.settle(this.now())
    return Math.min(wait ?? Infinity, TIER_WAIT_MS)
  }

  /**
   * Before the end: writes what shall outlive the process.
   * @returns false when there is no more to write
   */
  flush(): boolean {
    return this.offload?.flush(this.now()) ?? false
  }

  private keep(): void {
    this.keptMs = this.now()
    this.offload?.keep()
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
    if (question.kind === 'map') return { snapshot: this.snapshot(), map: this.map() }
    return answerOf(question, this.sharing, this.sessions, this.now())
  }

  private map(): KvMap {
    const { slots, history, offload } = this
    const { running, waiting } = this.scheduler
    const sequences = [...running, ...waiting]
    return kvMap(slots, this.sharing.cache, history, sequences, this.now(), offload?.outside)
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
      // Others that wait for their prompt were overtaken already.
      const next = this.scheduler.waiting.find((waiting) => !this.sharing.waits(waiting))
      if (!next || !this.sharing.continues(next, sequence)) return true
      if (!this.scheduler.fork(next, sequence)) return true
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
    // Only a fork has output before it has begun.
    const { tokens, request, length, unit } = sequence
    if (unit) return
    for (const token of tokens.subarray(request.prompt.length, length)) {
      this.sink.onToken(sequence.id, token, undefined)
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
    this.tell(sequence, token, logprobs)
  }

  /** A sequence has a new token, which may be its last. */
  private tell(sequence: Sequence, token: number, logprobs: TokenLogprobs | undefined): void {
    const { stopTokens, maxTokens } = sequence.request
    this.counts.outputTokens++
    sequence.logprobs += logprobs?.logprob ?? 0
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
      // What fails beneath it stops the engine: it is not its own.
      const own = thrown instanceof LatticeError && !BENEATH.has(thrown.code)
      if (!own) throw thrown
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

  /** Ends who has no room even alone: beams because of what is pinned, or anybody in a shortage. */
  private giveUpStuck(): boolean {
    const hopeless = this.shortage?.hopeless(this.now())
    if (hopeless && !hopeless.unit) this.finish(hopeless, 'error', memoryTaken())
    const unit = hopeless ? hopeless.unit : this.scheduler.stuck?.unit
    if (unit)
      this.endBeams(unit, -Infinity, hopeless ? memoryTaken() : this.scheduler.tooLarge(unit))
    return (hopeless ?? unit) !== undefined
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
}

/** Errors of those who move memory: nobody knows what is where afterwards. */
const BENEATH: ReadonlySet<ErrorCode> = new Set(['os_call_failed', 'pager_failed'])
