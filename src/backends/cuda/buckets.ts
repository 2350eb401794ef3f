// Owns the numbers of rows that a GPU is prepared for: those that decode steps have graphs for, and
// those that matrix products are measured with. Pure.

import { present } from '../../assert.ts'
import { paddedRows } from './matmul.ts'

/** Decoding sequences that a graph is captured for; a step takes the next larger one. */
export const BUCKETS = [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512]
/** Beyond them, multiples of this. */
const COARSE_BUCKET = 256
const SHORT_PROMPTS = [8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512]

/** The bucket that a number of decoding sequences falls into, of at most so many. */
export function bucketOf(rows: number, rowsMax: number): number {
  return Math.min(BUCKETS.find((bucket) => bucket >= rows) ?? coarseBucket(rows), rowsMax)
}

/** Numbers of rows that products of decode steps are measured for. */
export function bucketsUpTo(rowsMax: number): number[] {
  const padded = paddedRows(rowsMax)
  const buckets = BUCKETS.filter((bucket) => bucket <= padded)
  const last = present(BUCKETS.at(-1), 'a bucket')
  for (let rows = last + 1; rows <= padded; rows = coarseBucket(rows) + 1) {
    buckets.push(Math.min(coarseBucket(rows), padded))
  }
  return buckets
}

/**
 * Tokens of a step with prompts that products are measured for: those of short prompts, and
 * eighths of the largest step, which nearly all are.
 */
export function promptRows(stepTokens: number): number[] {
  const eighths = Array.from({ length: 8 }, (_, i) => Math.ceil((stepTokens * (i + 1)) / 8))
  const rows = [...SHORT_PROMPTS, ...eighths].map(paddedRows)
  return [...new Set(rows)].filter((count) => count <= paddedRows(stepTokens))
}

function coarseBucket(rows: number): number {
  return Math.ceil(rows / COARSE_BUCKET) * COARSE_BUCKET
}
