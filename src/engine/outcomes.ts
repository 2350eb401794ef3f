// Owns what becomes of what a step computed: the next token is drawn from logits, whoever waits for
// it is told, and a sequence that has had its last one leaves.

import { type ErrorCode, LatticeError } from '../errors.ts'
import type { Scheduler } from '../scheduler/scheduler.ts'
import type { FinishReason, TokenLogprobs } from './api.ts'
import { notANumber } from './ahead.ts'
import { type BeamGroup, tooFew } from './beam-group.ts'
import type { Hypothesis } from './beams.ts'
import type { CoreSink } from './core-contract.ts'
import { Sampler } from './sampler.ts'
import type { Sequence } from './sequence.ts'
import type { PromptSharing } from './sharing.ts'
import { EngineCounts } from './snapshot.ts'

export interface OutcomesOptions {
  scheduler: Scheduler<Sequence>
  sharing: PromptSharing
  sink: CoreSink
  /** Milliseconds that never go back. */
  now: () => number
  vocab: number
  /** Regions besides its own that a slot's tokens may lie in. */
  spansMax: number
}

export class Outcomes {
  /** Those that have not ended, by the id under which somebody waits; all of a search's are one. */
  readonly sequences = new Map<number, Sequence>()
  readonly counts = new EngineCounts()
  private readonly scheduler: Scheduler<Sequence>
  private readonly sharing: PromptSharing
  private readonly sink: CoreSink
  private readonly now: () => number
  private readonly spansMax: number
  private readonly sampler: Sampler
  /** A row of logits, for another sequence to sample from. */
  private readonly row: Float32Array

  constructor({ scheduler, sharing, sink, now, vocab, spansMax }: OutcomesOptions) {
    this.scheduler = scheduler
    this.sharing = sharing
    this.sink = sink
    this.now = now
    this.spansMax = spansMax
    this.sampler = new Sampler(vocab)
    this.row = new Float32Array(vocab)
  }

  /** Somebody waits for this sequence's end no more. */
  report(
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

  /** A sequence is about to have its first part of a step, unless it had one already. */
  start(sequence: Sequence): void {
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

  /**
   * A prompt is in memory: it is kept for later, and others that wait for it start from here.
   * False if it was to be pinned and could not be: then the sequence has ended.
   */
  share(sequence: Sequence, logits: Float32Array): boolean {
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

  /** A prompt is in memory; false as `share` has it. */
  keepPrompt(sequence: Sequence): boolean {
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

  /** Samples a sequence's next token and ends it if that was the last. */
  advance(sequence: Sequence, logits: Float32Array): void {
    if (sequence.unit) return this.advanceBeam(sequence.unit, sequence, logits)
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

  /** The first unknown token of a sequence is known. */
  takeIn(sequence: Sequence, token: number, logprobs: TokenLogprobs | undefined): void {
    if (token < 0) return this.finish(sequence, 'error', notANumber())
    sequence.unknown--
    this.tell(sequence, token, logprobs)
  }

  finish(sequence: Sequence, reason: FinishReason, error?: LatticeError): void {
    sequence.dropUnknown()
    sequence.ended = true
    if (sequence.slot >= 0 && reason !== 'error') this.sharing.ended(sequence)
    // After an abort nobody is likely to follow in its place: the pages go back within a step.
    this.scheduler.remove(sequence, reason === 'abort' ? -Infinity : this.now())
    const { id, outputTokens, logprobs, request } = sequence
    const scored = request.topLogprobs !== undefined && outputTokens > 0
    this.report(id, reason, outputTokens, error, scored ? logprobs / outputTokens : undefined)
  }

  /** Ends a sequence that has no room, with all that go together with it. */
  fail(sequence: Sequence, error: LatticeError): void {
    if (sequence.unit) this.endBeams(sequence.unit, -Infinity, error)
    else this.finish(sequence, 'error', error)
  }

  /** Takes all beams out; who still waits for a hypothesis gets the error. */
  endBeams(group: BeamGroup, sinceMs: number, error?: LatticeError): void {
    const running = this.scheduler.running.filter(({ unit }) => unit === group)
    for (const member of new Set([...running, group.lead])) this.scheduler.remove(member, sinceMs)
    group.ids.forEach((id, i) => {
      if (id === undefined) return
      group.ids[i] = undefined
      this.report(id, 'error', 0, error)
    })
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
}

/** Errors of those who move memory: nobody knows what is where afterwards. */
const BENEATH: ReadonlySet<ErrorCode> = new Set(['os_call_failed', 'pager_failed'])
