// Owns one sequence as the engine sees it: its tokens, how far its KV goes, and its sampler.

import { liveBytes } from '../kv/layout.ts'
import type { SlotTable } from '../kv/slots.ts'
import type { Image } from '../kv/image.ts'
import type { SamplingParams, SequenceRequest, SequenceSnapshot, SequenceState } from './api.ts'
import type { BeamGroup } from './beam-group.ts'
import { SamplerState } from './sampler.ts'

export class Sequence {
  readonly id: number
  readonly request: SequenceRequest
  /** Looked at often, by everybody, in every step. */
  readonly promptLength: number
  readonly sampler: SamplerState
  readonly arrivedMs: number
  /** Prompt, then output: in the request's own memory as long as there is none. */
  tokens: Int32Array
  length: number
  /** With all the output that it may have. */
  readonly lengthMax: number
  /** The last of them that were chosen, but are not known here yet. */
  unknown = 0
  computed = 0
  slot = -1
  image: Image | undefined
  turn = 0
  preemptions = 0
  /** It had to give way though nobody else ran: what it shares with the cache is what it lacks. */
  cramped = false
  /** What is cached of its prompt outside of memory: on its way, or no matter any more. */
  fetched: 'coming' | 'done' | undefined
  /** Tokens of its prompt that were in memory when it first left the queue. */
  cachedTokens = 0
  /** The choices of its request, which share its prompt; itself too. */
  readonly group: Sequence[]
  /** The beam search that it is a part of. */
  readonly unit: BeamGroup | undefined
  /** Sum of its tokens' log-probabilities, the stop token's too, if any were asked for. */
  logprobs = 0
  /** It has left the queue once; it may wait again if it is preempted. */
  started = false
  /** Nobody waits for it any more; a step that is under way may still bring it a token. */
  ended = false
  /** Whether its tokens are chosen here; undefined until somebody asked the backend. */
  hosted: boolean | undefined

  constructor(
    id: number,
    request: SequenceRequest,
    group: Sequence[] | undefined,
    nowMs: number,
    unit?: BeamGroup,
  ) {
    this.id = id
    this.group = group ?? [this]
    this.unit = unit
    this.request = request
    this.promptLength = request.prompt.length
    this.arrivedMs = nowMs
    this.sampler = new SamplerState(request.sampling, request.prompt)
    this.length = request.prompt.length
    this.lengthMax = this.length + request.maxTokens
    this.tokens = request.prompt
    // A search writes tokens wherever its beams are.
    if (unit) this.grow()
  }

  /** Another sequence with the tokens that this one has, to go on by itself. */
  fork(id: number, sampling: SamplingParams, nowMs: number): Sequence {
    const { request, group, tokens, length, outputTokens } = this
    const fork = new Sequence(id, { ...request, sampling }, group, nowMs)
    for (const token of tokens.subarray(length - outputTokens, length)) {
      // Draws what this one has drawn, so that the same sampling goes on alike.
      if (sampling.temperature > 0) fork.sampler.random.uniform()
      fork.push(token)
    }
    fork.logprobs = this.logprobs
    return fork
  }

  /** Tokens that it generated, as far as they are known. */
  get outputTokens(): number {
    return this.length - this.unknown - this.promptLength
  }

  get state(): SequenceState {
    if (this.image?.state === 'leaving') return 'offloading'
    if (this.image) return this.image.state === 'out' ? 'offloaded' : 'loading'
    if (this.slot < 0) return 'waiting'
    const decodes = this.outputTokens > 0 && this.computed === this.length - 1
    return decodes ? 'decode' : 'prefill'
  }

  snapshot(slots: SlotTable, nowMs: number): SequenceSnapshot {
    const { id, request, state, slot, computed, outputTokens } = this
    return {
      id,
      requestId: request.requestId,
      tenant: request.tenant,
      state,
      promptTokens: request.prompt.length,
      kvTokens: computed,
      outputTokens,
      pages: slot < 0 ? 0 : slots.pagesOf(slot),
      bytes: liveBytes(slots.layout, computed),
      ageMs: nowMs - this.arrivedMs,
    }
  }

  /** A token follows that is not known yet. */
  pushUnknown(): void {
    this.append(-1)
    this.unknown++
  }

  /** It has ended: what was computed for tokens beyond the known ones is nobody's. */
  dropUnknown(): void {
    this.length -= this.unknown
    this.unknown = 0
    this.computed = Math.min(this.computed, this.length)
  }

  push(token: number): void {
    this.append(token)
    this.sampler.accept(token)
  }

  private append(token: number): void {
    if (this.length === this.tokens.length) this.grow()
    this.tokens[this.length++] = token
  }

  private grow(): void {
    const { tokens, lengthMax } = this
    this.tokens = new Int32Array(lengthMax)
    this.tokens.set(tokens)
  }
}
