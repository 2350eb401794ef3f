// Owns a request's text: it joins an engine's tokens with the tokenizer and the stop strings, and
// hands out text deltas. The engine knows tokens only; servers and the CLI know text only.

import type { LatticeError } from '../errors.ts'
import type { Tokenizer } from '../text/tokenizer.ts'
import type { Engine, SamplingParams, TokenLogprobs } from './api.ts'

export interface GenerationRequest {
  requestId: string
  tenant: string
  prompt: Int32Array
  /** Independent samples; choice i samples with seed + i. */
  choices: number
  /** Without a seed the caller draws one: here it is always set. */
  sampling: SamplingParams
  maxTokens: number
  /** Ends a choice; never part of its text, not even partly. */
  stop: readonly string[]
  /** Keep generating after end-of-sequence tokens. */
  ignoreEos: boolean
  topLogprobs: number | undefined
}

export interface DeltaToken {
  token: number
  logprobs: TokenLogprobs | undefined
}

export type GenerationEvent =
  /** Text that is final: it cannot become part of a stop string. May be '' when only tokens are. */
  | { kind: 'delta'; choice: number; text: string; tokens: readonly DeltaToken[] }
  | {
      kind: 'finish'
      choice: number
      reason: 'stop' | 'length' | 'abort' | 'error'
      /** The stop string that matched, if one did. */
      matched: string | undefined
      outputTokens: number
      error: LatticeError | undefined
    }

export interface Generation {
  /** Ends after every choice's finish. Leaving the loop early aborts what still runs. */
  readonly events: AsyncIterable<GenerationEvent>
  abort(): void
}

/**
 * Starts `choices` sequences.
 * @throws LatticeError as `Engine.submit` does; then no sequence of the request runs.
 */
export function generate(
  _engine: Engine,
  _tokenizer: Tokenizer,
  _request: GenerationRequest,
): Generation {
  throw new Error('not written yet')
}
