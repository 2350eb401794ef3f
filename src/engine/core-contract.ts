// Owns what the core is given: its limits, and where its news go.

import type { LatticeError } from '../errors.ts'
import type { EvictionName } from '../kv/eviction.ts'
import type { FinishReason, TokenLogprobs } from './api.ts'
import type { OffloadOptions } from './offload.ts'

export interface CoreOptions extends OffloadOptions {
  maxSequences: number
  /** Hard limit on physical KV pages. */
  kvPages: number
  /** How many of them cached prefixes may keep; 0 is no prefix cache. */
  prefixPages?: number
  /** Lets in whoever fits, whatever those that run will need; else who is expected to fit. */
  greedy?: boolean
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
    score: number | undefined,
  ): void
}
