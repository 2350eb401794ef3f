// Owns the choice of attention kernels: which of them a shape takes, specialised to which sizes.

import { assert } from '../../assert.ts'
import { LatticeError } from '../../errors.ts'

/** What the kernels take and their tests cover. */
export const HEAD_DIMS: readonly number[] = [64, 96, 128, 256]
export const GROUP_MAX = 16

/** Compute capability 9.0. */
const HOPPER = 90

/** Heads of every layer of one model; `headDim` elements each. */
export interface AttentionShape {
  heads: number
  kvHeads: number
  /** 64, 96, 128 or 256. */
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
  /** Tokens that the copy engine brings at once, 64 dimensions of each; undefined if unused. */
  boxTokens?: number
}

export interface DecodeVariant extends AttentionVariant {
  /** Scratch memory of a block, for what it began or ended of other blocks' rows. */
  scratchBytes: number
  /** Counters of each row. */
  counters: number
}

/** Bytes on their way to a multiprocessor that keep its memory busy. */
const IN_FLIGHT = 96 * 2 ** 10
/** What a block needs besides its tiles: barriers, alignment. */
const BESIDES = 1280

/** Bytes of 64-dimension panels of one token's head: a last one is filled up with zeros. */
function panelBytes(headDim: number): number {
  return Math.ceil(headDim / 64) * 128
}

/**
 * The kernels that a device of this compute capability takes for a shape.
 * @param room dynamic shared memory that a block can have, in bytes
 * @throws LatticeError `model_unsupported` for heads that no kernel takes
 */
export function attentionVariants(
  shape: AttentionShape,
  capability: number,
  room: number,
): { decode: DecodeVariant; prefill: AttentionVariant } {
  // The copy engine brings 64 dimensions at a time.
  const hopper = capability === HOPPER && shape.headDim % 64 === 0
  const prefill = hopper ? hopperPrefillVariant(shape) : portablePrefillVariant(shape, room)
  return { decode: decodeVariant(shape, room), prefill }
}

/**
 * A block decodes one head with as many warps, of 16 tokens a tile, as leave room for two stages.
 */
function decodeVariant(shape: AttentionShape, room: number): DecodeVariant {
  const { headDim, kvHeads } = shape
  const columns = Math.ceil(groupOf(shape) / 8)
  for (const warps of [4, 2, 1]) {
    const stageBytes = 2 * 16 * warps * panelBytes(headDim)
    // float4 a lane: each warp's sums, then maxima and totals.
    const mergeBytes = warps * columns * (headDim / 16 + 1) * 32 * 16
    const fit = Math.floor((room - BESIDES - mergeBytes) / stageBytes)
    if (fit < 2) continue
    const enough = Math.min(fit, Math.max(2, Math.ceil(IN_FLIGHT / stageBytes)))
    // What has no room for a second block anyway keeps memory busy while a piece is finished.
    const alone = 2 * (enough * stageBytes + mergeBytes + BESIDES) > room
    const stages = alone ? fit : enough
    const share = Math.ceil(headDim / 16 / warps)
    return {
      file: 'attention-decode.cu',
      kernel: 'attentionDecode',
      defines: { ...definesOf(shape), WARPS: warps, STAGES: stages },
      threads: (warps + 1) * 32,
      sharedBytes: stages * stageBytes + mergeBytes + BESIDES,
      boxTokens: 16 * warps,
      scratchBytes: 2 * warps * columns * (share + 1) * 32 * 16,
      counters: kvHeads * warps,
    }
  }
  throw tooLarge(shape, room)
}

/** With warpgroup products. */
function hopperPrefillVariant(shape: AttentionShape): AttentionVariant {
  const { headDim } = shape
  const [keys, queryStages] = headDim > 128 ? [80, 1] : [128, 2]
  const [workers, stages] = [2, 2]
  const tiles = queryStages * 64 * workers + 2 * stages * keys
  return {
    file: 'attention-prefill-hopper.cu',
    kernel: 'attentionPrefill',
    defines: {
      ...definesOf(shape),
      ...{ KEYS: keys, WORKERS: workers, STAGES: stages, QUERY_STAGES: queryStages },
    },
    threads: 128 * (workers + 1),
    sharedBytes: tiles * panelBytes(headDim) + BESIDES,
    boxTokens: keys,
  }
}

/** What any GPU with bf16 tensor cores runs. */
function portablePrefillVariant(shape: AttentionShape, room: number): AttentionVariant {
  for (const keys of shape.headDim > 128 ? [32, 16] : [64, 32]) {
    const sharedBytes = (64 + 4 * keys) * (shape.headDim * 2 + 16)
    if (sharedBytes > room) continue
    return {
      file: 'attention-prefill.cu',
      kernel: 'attentionPrefill',
      defines: { ...definesOf(shape), KEYS: keys },
      threads: 128,
      sharedBytes,
    }
  }
  throw tooLarge(shape, room)
}

function tooLarge({ headDim }: AttentionShape, room: number): LatticeError {
  return new LatticeError(
    'model_unsupported',
    `Heads of ${headDim} dimensions do not fit in ${room} bytes of shared memory.`,
    { todo: 'Use a larger GPU, or --device cpu.' },
  )
}

function groupOf(shape: AttentionShape): number {
  const group = shape.heads / shape.kvHeads
  assert(Number.isInteger(group), 'query heads share key/value heads evenly')
  return group
}

/** @throws LatticeError `model_unsupported` for heads that no kernel takes */
function definesOf(shape: AttentionShape): Record<string, number> {
  const { headDim, kvHeads, softcap } = shape
  const group = groupOf(shape)
  if (!HEAD_DIMS.includes(headDim) || group > GROUP_MAX) {
    throw new LatticeError(
      'model_unsupported',
      `The GPU has no attention for ${group} query heads of ${headDim} dimensions a KV head.`,
      { todo: `It takes ${HEAD_DIMS.join(', ')} dimensions and ${GROUP_MAX} heads: --device cpu.` },
    )
  }
  const defines = { HEAD_DIM: headDim, GROUP: group, KV_HEADS: kvHeads }
  return softcap === undefined ? defines : { ...defines, SOFTCAP: 1 }
}
