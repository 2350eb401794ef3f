// Owns what the main thread and the engine thread say to each other. One message a step carries
// all of its tokens; a shared counter wakes the engine when it sleeps.

import type { Quantization } from '../backends/cuda/quantization.ts'
import type { NullBackendOptions } from '../backends/null/backend.ts'
import { LatticeError, type LatticeErrorJson } from '../errors.ts'
import type { EvictionName } from '../kv/eviction.ts'
import type { KvLayout } from '../kv/layout.ts'
import type {
  DirectPlace,
  EngineAnswers,
  EngineQuestion,
  EngineSnapshot,
  FinishReason,
  SamplingParams,
  SequenceRequest,
  TokenLogprobs,
} from './api.ts'
import type { Watermarks } from './offload.ts'
import type { PagerStart } from '../tier/pager.ts'
import type { TierFacts } from '../tier/tier.ts'

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
  kvOffload?: OffloadPlace
  /** When cached prefixes go there; 90 and 80 % unless given. */
  kvWatermarks?: Watermarks
  /** A ring of the kernel's that says which clients have gone (bpf/disconnect.bpf.c). */
  disconnects?: RingPlace
  /** One 32-bit counter; it grows with every message to the engine. */
  signal: SharedArrayBuffer
}

/** A map of the kernel's by its descriptor, and its size in bytes. */
export interface RingPlace {
  fd: number
  bytes: number
}

/** A file that KV goes to: how large, and the directory that it lies in. */
export interface OffloadPlace {
  bytes: number
  path?: string
  store?: StorePlace
}

/** A directory where prefixes outlive the process; its key as src/tier/store/secret.ts has it. */
export interface StorePlace {
  directory: string
  key: string
}

export type BackendChoice =
  /** `cpus`: cores for compute threads. */
  | { kind: 'cpu'; modelPath: string; cpus: readonly number[] }
  /**
   * `device`: which GPU. `kvIdleReleaseMs`: when idle KV memory goes back to its driver.
   * `kvHostBytes`: memory of the host for KV that it has no room for. `quantization`: what its
   * matrices become; bfloat16 unless given.
   */
  | {
      kind: 'cuda'
      modelPath: string
      device: number
      kvIdleReleaseMs?: number
      kvHostBytes?: number
      quantization?: Quantization
    }
  | ({ kind: 'null' } & Pick<
      NullBackendOptions,
      'vocab' | 'kv' | 'stepMs' | 'fault' | 'tierColumns' | 'ahead'
    >)

export type ToEngine =
  /** Choices of one request in one message, so that their prompt is computed once for certain. */
  | { kind: 'submit'; ids: number[]; request: SequenceRequest; samplings: SamplingParams[] }
  | { kind: 'fork'; parent: number; id: number; sampling: SamplingParams }
  | { kind: 'abort'; id: number }
  /** From now on prompts come from there as well; undefined ends what came from there. */
  | { kind: 'direct'; place: DirectPlace | undefined }
  | { kind: 'snapshot'; ticket: number }
  | { kind: 'ask'; ticket: number; question: EngineQuestion }
  | { kind: 'close' }

export interface FinishMessage {
  id: number
  reason: FinishReason
  outputTokens: number
  error: LatticeErrorJson | undefined
  score: number | undefined
}

export interface EngineFacts {
  variant: string
  repackedBytes: Record<string, number>
  layout: KvLayout
  kvPages: number
  tier?: TierFacts
  hostTier?: HostTierFacts
  /** What the start took, if its parts are worth telling. */
  started?: string | undefined
}

/** Memory of the host that a GPU's KV goes to. */
export interface HostTierFacts {
  bytes: number
  /** How long it took to pin it. */
  pinnedMs: number
}

export type FromEngine =
  /** Sent before `ready`, by an engine that needs a pager. */
  | { kind: 'pager'; start: PagerStart }
  /** Sent before `ready`: what the start is about to spend its time on, if that is long. */
  | { kind: 'starting'; what: string }
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

/** What a fork of a sequence is told that has ended. */
export function sequenceEnded(): LatticeError {
  return new LatticeError('not_found', 'The sequence to fork has ended.', {
    todo: 'Fork it while it runs, or send its tokens as a prompt.',
  })
}
