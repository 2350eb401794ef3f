// Owns the choice of attention kernels: which of them a shape takes, specialised to which sizes.

import { assert } from '../../assert.ts'
import type { GpuDevice } from '../../ffi/cuda.ts'

/** Heads of every layer of one model; `headDim` elements each. */
export interface AttentionShape {
  heads: number
  kvHeads: number
  /** 64, 96, 128 or 256; other multiples of 16 work, untuned. */
  headDim: number
  /** Of q·k. */
  scale: number
  /** Scores x become cap · tanh(x / cap); undefined for most models. */
  softcap?: number | undefined
}

export interface AttentionVariant {
  /** A file of kernels/, the function in it, and the macros that it is specialised by. */
  file: string
  kernel: string
  defines: Readonly<Record<string, number>>
  threads: number
  /** Dynamic shared memory of a block. */
  sharedBytes: number
}

export interface DecodeVariant extends AttentionVariant {
  /** Tells variants of one shape apart. */
  name: string
  /** Scratch memory for one unfinished piece of work. */
  pieceBytes: number
}

/** Unfinished pieces that a block can have: at the start and at the end of its stretch. */
export const DECODE_PIECES = 2

/** Rows times key/value heads up to which short splits matter more than long reads. */
const FEW_HEADS = 64

/**
 * Many rows are read in long runs, a block taking all heads of its tokens that fit; with few rows
 * a block takes one head, so that even a short context fills the device.
 */
export function decodeVariant(
  shape: AttentionShape,
  rows: number,
  device: GpuDevice,
): DecodeVariant {
  const { headDim, kvHeads } = shape
  const few = rows * kvHeads <= FEW_HEADS
  const heads = few ? 1 : headsOfBlock(shape)
  const warps = Math.max(1, Math.min(Math.floor((few ? 4 : 8) / heads), 1024 / (heads * headDim)))
  const tokenWarps = Math.floor(warps)
  const group = groupOf(shape)
  // float4 a lane: the sums of 8 columns, then maxima and totals.
  const stateBytes = Math.ceil(group / 8) * (headDim / 16 + 1) * 32 * 16
  const mergeBytes = tokenWarps > 1 ? tokenWarps * heads * stateBytes : 0
  const stageBytes = 16 * tokenWarps * (heads * headDim * 4 + 16)
  const room = device.sharedBytesPerBlock - mergeBytes - 256
  const stages = Math.min(8, Math.floor(room / (stageBytes + 16)))
  assert(stages >= 2, 'two stages fit')
  return {
    name: few ? 'few' : 'many',
    file: 'attention-decode.cu',
    kernel: 'attentionDecode',
    defines: {
      ...definesOf(shape),
      HEAD_BLOCK: heads,
      TOKEN_WARPS: tokenWarps,
      STAGES: stages,
    },
    threads: (heads * tokenWarps + 1) * 32,
    sharedBytes: stages * (stageBytes + 16) + mergeBytes + heads * 4,
    pieceBytes: heads * stateBytes,
  }
}

export function prefillVariant(shape: AttentionShape): AttentionVariant {
  const keys = shape.headDim > 128 ? 32 : 64
  return {
    file: 'attention-prefill.cu',
    kernel: 'attentionPrefill',
    defines: { ...definesOf(shape), KEYS: keys },
    threads: 128,
    sharedBytes: (64 + 4 * keys) * (shape.headDim * 2 + 16),
  }
}

function groupOf(shape: AttentionShape): number {
  const group = shape.heads / shape.kvHeads
  assert(Number.isInteger(group), 'query heads share key/value heads evenly')
  return group
}

function definesOf(shape: AttentionShape): Record<string, number> {
  const { headDim, kvHeads, softcap } = shape
  assert(headDim % 16 === 0, 'tensor cores take heads of a multiple of 16')
  const defines = { HEAD_DIM: headDim, GROUP: groupOf(shape), KV_HEADS: kvHeads }
  return softcap === undefined ? defines : { ...defines, SOFTCAP: 1 }
}

/** The most heads, of those that divide them, that warps and shared memory have room for. */
function headsOfBlock({ kvHeads, headDim }: AttentionShape): number {
  let heads = 1
  for (let n = 2; n <= 8; n++) if (kvHeads % n === 0 && n * headDim <= 1024) heads = n
  return heads
}
