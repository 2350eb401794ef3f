// Owns the shape of products with 5–128 tokens on Hopper: how skinny-hopper.cu may be specialised
// for a matrix, the likeliest to be fastest first, and over how many blocks.

import type { GemvEpilogue } from './gemv.ts'

export interface HopperVariant {
  defines: Readonly<Record<string, number>>
  /** Rows of a box of the weights' tensor map, and of one of the tokens'. */
  weightBox: number
  tokens: number
  /** Blocks of a cluster, and steps of K that are under way. */
  split: number
  stages: number
  blocks: number
  threads: number
  sharedBytes: number
}

export interface HopperShape {
  /** Of the matrix; elements of a row. */
  rows: number
  k: number
  tokens: number
  epilogue: GemvEpilogue
  /** Of the rotation: elements of a head. */
  headDim: number
}

/** The most tokens that products are computed for so; more go to the matrix library. */
export const HOPPER_TOKENS_MAX = 128

/** Columns of a warpgroup's product. */
const TOKENS = [8, 16, 32, 64, 96, HOPPER_TOKENS_MAX]
/** Elements of K at a time. */
const STEP = 64
const BARRIER_BYTES = 256
/** Of a block of the small kernels between two products: it is to be there before its turn. */
const BESIDE_BYTES = 1408
const TILE_ROWS = [64, 128, 256]
const SPLITS = [1, 2, 4]
/** Beyond this, more steps under way bring nothing. */
const STAGES_MAX = 8
/** Multiprocessors of the smallest unit that a cluster lies in are a multiple of this. */
const CLUSTERED = 16

/** Columns that a product of so many tokens is computed with; undefined if they are too many. */
export function hopperColumns(tokens: number): number | undefined {
  return TOKENS.find((count) => count >= tokens)
}

/**
 * Variants for a product, none where the kernel is not made for it: rows that are no whole number
 * of 16-byte loads, a rotation of parts of a head.
 * @param room dynamic shared memory that a block can have, in bytes
 */
export function hopperVariants(
  { rows, k, tokens, epilogue, headDim }: HopperShape,
  multiprocessors: number,
  room: number,
): HopperVariant[] {
  const columns = hopperColumns(tokens)
  if (columns === undefined || k % 8 !== 0) return []
  const paired = epilogue === 'glu' || epilogue === 'rope'
  if (epilogue === 'rope' && headDim % 64 !== 0) return []
  if (epilogue === 'glu' && rows % 2 !== 0) return []
  const steps = Math.ceil(k / STEP)
  const found: { variant: HopperVariant; busiest: number }[] = []
  for (const tileRows of TILE_ROWS) {
    for (const split of SPLITS) {
      if (split > steps || columns % split !== 0) continue
      const share = columns / split
      const sumBytes = (columns + share * (split - 1)) * (tileRows + 4) * 4
      const stageBytes = (tileRows + columns) * STEP * 2
      const fit = Math.floor((room - BESIDE_BYTES - BARRIER_BYTES - sumBytes) / stageBytes)
      const stages = Math.min(STAGES_MAX, fit)
      if (stages < 3) continue
      const tiles = Math.ceil(rows / tileRows)
      const whole = split <= 2 ? multiprocessors : multiprocessors - (multiprocessors % CLUSTERED)
      const clusters = Math.min(tiles, Math.floor(whole / split))
      const variant = {
        defines: { ROWS: tileRows, TOKENS: columns },
        weightBox: paired ? 32 : 64,
        tokens: columns,
        split,
        stages,
        blocks: clusters * split,
        threads: tileRows * 2 + 32,
        sharedBytes: stages * stageBytes + sumBytes + BARRIER_BYTES,
      }
      // What the busiest block reads, its tokens again for each tile.
      const rounds = Math.ceil(tiles / clusters)
      const busiest = rounds * Math.ceil(steps / split) * (tileRows + columns / 3)
      found.push({ variant, busiest })
    }
  }
  return found.toSorted((a, b) => a.busiest - b.busiest).map(({ variant }) => variant)
}
