// Owns the engine's loop body: plan a step, run it, sample, tell. It has no thread and no clock of
// its own, so that it runs the same in a worker, in a test and in a simulation.
//
// Newcomers start at `step`.

import { present } from '../assert.ts'
import { LatticeError } from '../errors.ts'
import { EVICTION_DEFAULT, type EvictionName } from '../kv/eviction.ts'
import { KvHistory, watched } from '../kv/history.ts'
import { liveBytes } from '../kv/layout.ts'
import { type KvMap, kvMap } from '../kv/map.ts'
import { PrefixCache } from '../kv/prefix.ts'
import { RegionTable } from '../kv/regions.ts'
import { SlotTable } from '../kv/slots.ts'
import { KV_MAPPINGS_MAX } from '../limits.ts'
import { isDecoding, type ScheduledPart, Scheduler } from '../scheduler/scheduler.ts'
import { type Backend, StepBatch } from '../backends/backend.ts'
import type {
  EngineAnswers,
  EngineQuestion,
  EngineSnapshot,
  FinishReason,
  SamplingParams,
  SequenceRequest,
  SequenceSnapshot,
  TokenLogprobs,
} from './api.ts'
import { Sampler } from './sampler.ts'
import { Sequence } from './sequence.ts'
import { PromptSharing } from './sharing.ts'

export interface CoreOptions {
  maxSequences: number
  /** Hard limit on physical KV pages. */
  kvPages: number
  /** How many of them cached prefixes may keep; 0 is no prefix cache. */
  prefixPages?: number
  /** Which of them go first; 'cost' unless told. */
  prefixEviction?: EvictionName | undefined
  /** Whether answers are cached as prompts are. */
  prefixOutput?: boolean | undefined
}

/** Where the core's news go, while one of its methods runs. It must not call back into the core. */
export interface CoreSink {
  /** The sequence has left the queue; the step that begins its prompt is about to be computed. */
  onStart(id: number, cachedTokens: number): void
  onToken(id: number, token: number, logprobs: TokenLogprobs | undefined): void
  onFinish(
    id: number,
    reason: FinishReason,
    outputTokens: number,
    error: LatticeError | undefined,
  ): void
}

/**
 * How long the pages of an ended sequence wait for one that overwrites them. Longer than the gap
 * between a client's requests in a closed loop; short, because idle memory must be back with the
 * kernel within 100 ms and the kernel takes 50 ms a GiB.
 */
const WARM_MS = 20

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
  private readonly sequences = new Map<number, Sequence>()
  private readonly batch: StepBatch
  private readonly sampler: Sampler
  /** A row of logits, for another sequence to sample from. */
  private readonly row: Float32Array
  private steps = 0
  private promptTokens = 0
  private outputTokens = 0
  private computeMs = 0
  private stepMs = 0
  private readonly finished: Record<FinishReason, number> = {
    stop: 0,
    length: 0,
    abort: 0,
    error: 0,
  }

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
    const { prefixPages, prefixEviction: eviction = EVICTION_DEFAULT } = options
    const { pageBytes } = kv.layout.shape
    const onEvict = (pages: number): void => this.history.add('evict', pages * pageBytes)
    const cache = prefixPages
      ? new PrefixCache(regions, prefixPages, { eviction, now, onEvict })
      : undefined
    this.sharing = new PromptSharing(this.slots, cache, {
      output: options.prefixOutput ?? false,
      onPreempt: (pages) => this.history.add('preempt', pages * pageBytes),
      computeMin: Math.max(1, chunkTokensMin),
      spansMax: Math.max(1, Math.floor(KV_MAPPINGS_MAX / (kv.slots * kv.layout.ranges)) - 1),
    })
    this.scheduler = new Scheduler(
      this.slots,
      { stepTokens: backend.stepTokensMax, maxSequences: options.maxSequences, chunkTokensMin },
      this.sharing,
    )
    this.batch = new StepBatch(backend.stepTokensMax, options.maxSequences)
    this.sampler = new Sampler(backend.vocab)
    this.row = new Float32Array(backend.vocab)
  }

  get idle(): boolean {
    return this.sequences.size === 0
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
        this.finished.error++
        this.sink.onFinish(id, 'error', 0, thrown)
      }
    })
  }

  abort(id: number): void {
    const sequence = this.sequences.get(id)
    if (sequence) this.finish(sequence, 'abort')
  }

  /**
   * Runs one step: every decoding sequence gains a token and prompts advance by a chunk.
   * @returns false if there was nothing to do.
   * @throws what the backend throws; then the core is of no more use.
   */
  step(): boolean {
    const start = this.now()
    const parts = this.scheduler.plan()
    if (parts.length === 0) return false
    this.fill(parts)
    const computeStart = this.now()
    this.backend.launch(this.batch)
    const rows = this.backend.collect()
    this.computeMs += this.now() - computeStart
    this.commit(parts, rows)
    this.releaseOverdue()
    this.steps++
    this.stepMs += this.now() - start
    return true
  }

  /**
   * Gives back pages of sequences that ended, slot by slot: called again and again while there is
   * nothing else to do, it holds up a sequence that arrives by a millisecond, not by all of them.
   * @returns milliseconds until there is more to give back, or undefined if there is nothing.
   */
  settle(): number | undefined {
    const bytes = this.slots.warmPages * this.backend.kv.layout.shape.pageBytes
    if (this.idle && bytes > WARM_IDLE_BYTES) {
      this.slots.reclaim(Infinity)
      return 0
    }
    this.releaseOverdue()
    const { warmSinceMs } = this.slots
    return warmSinceMs === undefined ? undefined : Math.max(0, warmSinceMs + WARM_MS - this.now())
  }

  /** Throws if the account of memory contradicts itself. */
  check(): void {
    this.sharing.check()
  }

  snapshot(): EngineSnapshot {
    const { layout } = this.backend.kv
    const { cachedPages, pinnedPages, evictions } = this.sharing.gauges
    const now = this.now()
    const sequences = [...this.sequences.values()].map((sequence): SequenceSnapshot => {
      const { request, computed, slot } = sequence
      return {
        id: sequence.id,
        requestId: request.requestId,
        tenant: request.tenant,
        state: slot < 0 ? 'waiting' : isDecoding(sequence) ? 'decode' : 'prefill',
        promptTokens: request.prompt.length,
        kvTokens: computed,
        outputTokens: sequence.outputTokens,
        pages: slot < 0 ? 0 : this.slots.pagesOf(slot),
        bytes: liveBytes(layout, computed),
        ageMs: now - sequence.arrivedMs,
      }
    })
    return {
      sequences,
      running: this.scheduler.running.length,
      waiting: this.scheduler.waiting.length,
      kv: {
        pageBytes: layout.shape.pageBytes,
        usedPages: this.slots.usedPages,
        limitPages: this.slots.limitPages,
        residentBytes: this.backend.kv.residentBytes(),
        cachedPages,
        pinnedPages,
      },
      prefixQueries: this.sharing.queries,
      prefixHits: this.sharing.hits,
      prefixEvictions: evictions,
      steps: this.steps,
      promptTokens: this.promptTokens,
      outputTokens: this.outputTokens,
      finished: { ...this.finished },
      preemptions: this.scheduler.preemptions,
      computeMs: this.computeMs,
      stepMs: this.stepMs,
    }
  }

  /** Answers what was asked, or does what was told, between two steps. */
  answer<Q extends EngineQuestion>(question: Q): EngineAnswers[Q['kind']]
  answer(question: EngineQuestion): EngineAnswers[keyof EngineAnswers] {
    if (question.kind === 'pinned') return this.sharing.pinned(this.now(), question.tenant)
    if (question.kind === 'map') return { snapshot: this.snapshot(), map: this.map() }
    return this.sharing.unpin(question.tenant, question.id)
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

  private commit(parts: readonly ScheduledPart<Sequence>[], rows: readonly Float32Array[]): void {
    let row = 0
    for (const { sequence, count } of parts) {
      sequence.computed += count
      if (sequence.outputTokens === 0) this.promptTokens += count
      if (sequence.computed < sequence.length) continue
      const logits = present(rows[row++], 'a row of logits')
      if (sequence.outputTokens === 0 && !this.share(sequence, logits)) continue
      this.advance(sequence, logits)
    }
  }

  /**
   * A prompt is in memory: it is kept for later, and others that wait for it start from here.
   * False if it was to be pinned and could not be: then the sequence has ended.
   */
  private share(sequence: Sequence, logits: Float32Array): boolean {
    try {
      this.sharing.computed(sequence)
    } catch (thrown) {
      if (!(thrown instanceof LatticeError)) throw thrown
      this.finish(sequence, 'error', thrown)
      return false
    }
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

  private start(sequence: Sequence): void {
    if (sequence.started) return
    this.sharing.started(sequence)
    sequence.started = true
    this.sink.onStart(sequence.id, sequence.cachedTokens)
  }

  /** Samples a sequence's next token and ends it if that was the last. */
  private advance(sequence: Sequence, logits: Float32Array): void {
    const { topLogprobs, stopTokens, maxTokens } = sequence.request
    try {
      const token = this.sampler.sample(logits, sequence.sampler)
      sequence.push(token)
      this.outputTokens++
      if (stopTokens.includes(token)) return this.finish(sequence, 'stop')
      const logprobs =
        topLogprobs === undefined ? undefined : this.sampler.logprobs(logits, token, topLogprobs)
      this.sink.onToken(sequence.id, token, logprobs)
      if (sequence.outputTokens === maxTokens) this.finish(sequence, 'length')
    } catch (thrown) {
      if (!(thrown instanceof LatticeError)) throw thrown
      this.finish(sequence, 'error', thrown)
    }
  }

  private finish(sequence: Sequence, reason: FinishReason, error?: LatticeError): void {
    if (sequence.slot >= 0 && reason !== 'error') this.sharing.ended(sequence)
    // After an abort nobody is likely to follow in its place: the pages go back within a step.
    this.scheduler.remove(sequence, reason === 'abort' ? -Infinity : this.now())
    this.sequences.delete(sequence.id)
    this.finished[reason]++
    this.sink.onFinish(sequence.id, reason, sequence.outputTokens, error)
  }

  /** Gives back the pages of all aborted sequences, and of one that ended a while ago. */
  private releaseOverdue(): void {
    while (this.slots.reclaim(-Infinity) >= 0);
    this.slots.reclaim(this.now() - WARM_MS)
  }
}
