// Owns where a token's keys and values lie inside a slot, and how many pages any length needs.
//
// A slot is a contiguous virtual range for one sequence, cut into `ranges` (one for each layer on
// the host, one for all layers on a GPU). A token's row in a range is its K then its V:
//
//   slot  | layer 0: KV KV KV … (room for maxTokens) | layer 1: KV KV KV … | … |
//            ^ token 0, 1, 2 …                          ^ rangeBytes apart
//
// Ranges start on a page, so a page belongs to one sequence and one range.

import { assert } from '../assert.ts'

export interface KvShape {
  layers: number
  /** Bytes of one token's K and V in one layer. */
  rowBytes: number
  maxTokens: number
  pageBytes: number
  /** 1 unless told: memory that is mapped in larger pieces shares larger pieces. */
  shareColumns?: number
}

export interface KvLayout {
  shape: KvShape
  /** Ranges of a slot that grow independently. */
  ranges: number
  /** From a token to the next, within a layer. */
  tokenStride: number
  /** From a layer to the next, for the same token. */
  layerStride: number
  /** Bytes of a range, a multiple of the page and of the token stride. */
  rangeBytes: number
  /** From a slot to the next; a multiple of the token stride: rows count on across slots. */
  slotBytes: number
  /** Columns (pages of each range) are shared in groups of this many, aligned to as many. */
  shareColumns: number
}

/** One range for each layer: what reads best on a CPU, whose prefetcher stops at a page. */
export function layerMajor(shape: KvShape): KvLayout {
  return layout(shape, shape.layers, shape.rowBytes)
}

/** One range for all layers: at most one partly filled page a sequence, however large the page. */
export function tokenMajor(shape: KvShape): KvLayout {
  return layout(shape, 1, shape.rowBytes * shape.layers)
}

function layout(shape: KvShape, ranges: number, tokenStride: number): KvLayout {
  const { shareColumns = 1 } = shape
  const unit = leastCommonMultiple(shape.pageBytes * shareColumns, tokenStride)
  const rangeBytes = Math.ceil((shape.maxTokens * tokenStride) / unit) * unit
  const slotBytes = rangeBytes * ranges
  const layerStride = ranges === 1 ? shape.rowBytes : rangeBytes
  assert(Number.isSafeInteger(slotBytes), 'a slot fits the address arithmetic')
  return { shape, ranges, tokenStride, layerStride, rangeBytes, slotBytes, shareColumns }
}

/** Pages that hold `tokens` tokens of one sequence: exact, not an estimate. */
export function pagesFor(layout: KvLayout, tokens: number): number {
  return layout.ranges * Math.ceil((tokens * layout.tokenStride) / layout.shape.pageBytes)
}

/** The longest sequence that `pages` pages hold: the inverse of `pagesFor`. */
export function tokensIn(layout: KvLayout, pages: number): number {
  const rangePages = Math.floor(pages / layout.ranges)
  return Math.floor((rangePages * layout.shape.pageBytes) / layout.tokenStride)
}

/** Bytes of keys and values that `tokens` tokens really are, without page rounding. */
export function liveBytes(layout: KvLayout, tokens: number): number {
  return tokens * layout.shape.rowBytes * layout.shape.layers
}

/** The last column at or before `column` that begins a group, and with a token's first byte. */
export function tokenAlignedColumn(layout: KvLayout, column: number): number {
  const { shape, shareColumns, tokenStride } = layout
  const { pageBytes } = shape
  const unit = leastCommonMultiple(pageBytes * shareColumns, tokenStride) / pageBytes
  return column - (column % unit)
}

function leastCommonMultiple(a: number, b: number): number {
  let [x, y] = [a, b]
  while (y > 0) [x, y] = [y, x % y]
  return (a / x) * b
}
