// Owns what launches of a step refer to: the device's parts, where things lie, and which kernels
// may be used.

import type { CudaDriver } from '../../ffi/cuda.ts'
import type { KvLayout } from '../../kv/layout.ts'
import type { RopeConfig } from '../../model/model.ts'
import type { DecodeRows, PrefillSegments } from './attention.ts'
import type { Choices } from './choices.ts'
import type { E4m3 } from './e4m3-rows.ts'
import type { KernelFinder } from './kernels.ts'
import type { Matmuls } from './matmul.ts'
import type { StepState } from './state.ts'
import type { DeviceWeights } from './weights.ts'

/** How many rows of each kind a step has. */
export interface StepShape {
  stream: number
  tokens: number
  outputs: number
  /** Of the tokens, those in front that are the only ones of their sequence. */
  singles: number
  /** Stretches of the other tokens. */
  segments: number
}

export type HopperUse = 'never' | 'measured' | 'always'

/** Attention over KV memory, as CudaAttention does it; tests have another. */
export interface Attention {
  decode(stream: number, rows: DecodeRows, layer: number, window?: number): void
  prefill(stream: number, segments: PrefillSegments, layer: number, window?: number): void
  close(): void
}

/** What launches refer to. */
export interface LowerContext {
  driver: CudaDriver
  find: KernelFinder
  matmuls: Matmuls
  weights: DeviceWeights
  /** What products of e4m3 need, if there are any. */
  e4m3?: E4m3 | undefined
  attention: Attention
  state: StepState
  layout: KvLayout
  /** Where region 0 of the KV memory lies, and how many there are. */
  kv: { address: number; regions: number }
  multiprocessors: number
  /** Shared memory that a block may have. */
  sharedBytes: number
  /** Whether a step of few tokens is one kernel where it can be. */
  wholeSteps: boolean
  /** [outputs, vocab] float32 */
  logits: number
  /** Device address of a rotation's frequencies. */
  ropeTable: (rope: RopeConfig) => { address: number; magnitude: number }
  /** Bytes that gemv.cu may bring into L2 ahead of its turn. */
  prefetchBytes: number
  releaseRounds: number
  /** Whether kernels may start while the one before them ends. */
  overlap: boolean
  /** Whether products of few tokens have kernels of their own. */
  skinny: boolean
  /** Dynamic shared memory of a block of skinny-hopper.cu; 0 where that does not run. */
  hopperRoom: number
  /** Where that is used: where it was measured to be faster, or wherever it fits. */
  hopper: HopperUse
  /** What was measured to be fastest for which product. */
  choices: Choices
}
