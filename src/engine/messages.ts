// Owns what the main thread and the engine thread say to each other. One message a step carries
// all of its tokens; a shared counter wakes the engine when it sleeps.

import type { NullBackendOptions } from '../backends/null/backend.ts'
import type { LatticeErrorJson } from '../errors.ts'
import type { EvictionName } from '../kv/eviction.ts'
import type { KvLayout } from '../kv/layout.ts'
import type {
  EngineAnswers,
  EngineQuestion,
  EngineSnapshot,
  FinishReason,
  SamplingParams,
  SequenceRequest,
  TokenLogprobs,
} from './api.ts'

export interface EngineThreadOptions {
  backend: BackendChoice
  contextLength: number
  maxSequences: number
  stepTokens: number
  /** Hard limit on KV memory in bytes; rounded down to whole pages. */
  kvBytes: number
  /** Bytes of KV memory that cached prefixes may keep; none unless given. */
  prefixCacheBytes?: number
  /** Which of them go first; 'cost' unless given. */
  prefixEviction?: EvictionName
  /** Whether they hold answers too; not unless given. */
  prefixCacheOutput?: boolean
  /** One 32-bit counter; it grows with every message to the engine. */
  signal: SharedArrayBuffer
}

export type BackendChoice =
  /** `cpus`: cores for compute threads. */
  | { kind: 'cpu'; modelPath: string; cpus: readonly number[] }
  | ({ kind: 'null' } & Pick<NullBackendOptions, 'vocab' | 'kv' | 'stepMs' | 'fault'>)

export type ToEngine =
  /** Choices of one request in one message, so that their prompt is computed once for certain. */
  | { kind: 'submit'; ids: number[]; request: SequenceRequest; samplings: SamplingParams[] }
  | { kind: 'abort'; id: number }
  | { kind: 'snapshot'; ticket: number }
  | { kind: 'ask'; ticket: number; question: EngineQuestion }
  | { kind: 'close' }

export interface FinishMessage {
  id: number
  reason: FinishReason
  outputTokens: number
  error: LatticeErrorJson | undefined
}

export interface EngineFacts {
  variant: string
  repackedBytes: Record<string, number>
  layout: KvLayout
  kvPages: number
}

export type FromEngine =
  | { kind: 'ready'; facts: EngineFacts }
  /** Sent before the step that begins the sequence is computed, not with its tokens. */
  | { kind: 'started'; id: number; cachedTokens: number }
  | {
      kind: 'tokens'
      /** Pairs: sequence id, token. Before `finished` in time. */
      tokens: Int32Array
      /** By index of the pair; only for sequences that asked. */
      logprobs: Map<number, TokenLogprobs> | undefined
      finished: FinishMessage[]
    }
  /** Ticket 0: nobody asked, but a step begins during which nobody can be answered. */
  | { kind: 'snapshot'; ticket: number; snapshot: EngineSnapshot }
  | { kind: 'answer'; ticket: number; answer: EngineAnswers[keyof EngineAnswers] }
  /** The engine cannot go on: nothing follows, and whoever has no finish yet gets none from it. */
  | { kind: 'failed'; error: LatticeErrorJson }
