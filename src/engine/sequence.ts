// Owns one sequence as the engine sees it: its tokens, how far its KV goes, and its sampler.

import type { SequenceRequest } from './api.ts'
import { SamplerState } from './sampler.ts'

export class Sequence {
  readonly id: number
  readonly request: SequenceRequest
  readonly sampler: SamplerState
  readonly arrivedMs: number
  /** Prompt, then output. */
  readonly tokens: Int32Array
  length: number
  computed = 0
  slot = -1
  /** Tokens of its prompt that were in memory when it first left the queue. */
  cachedTokens = 0
  /** Those it shares its prompt with, itself too; undefined if it is alone. */
  readonly group: Sequence[] | undefined
  /** It has left the queue once; it may wait again if it is preempted. */
  started = false

  constructor(id: number, request: SequenceRequest, group: Sequence[] | undefined, nowMs: number) {
    this.id = id
    this.group = group
    this.request = request
    this.arrivedMs = nowMs
    this.sampler = new SamplerState(request.sampling, request.prompt)
    this.tokens = new Int32Array(request.prompt.length + request.maxTokens)
    this.tokens.set(request.prompt)
    this.length = request.prompt.length
  }

  get promptLength(): number {
    return this.request.prompt.length
  }

  get outputTokens(): number {
    return this.length - this.promptLength
  }

  /** Everything but its last token is in memory: the next step finds a new one. */
  get upToDate(): boolean {
    return this.outputTokens > 0 && this.computed === this.length - 1
  }

  push(token: number): void {
    this.tokens[this.length++] = token
    this.sampler.accept(token)
  }
}
