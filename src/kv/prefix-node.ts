// Owns one node of the prefix cache's tree: tokens that follow those of its parent, and where their
// keys and values lie.

import type { Evictable } from './eviction-queue.ts'
import type { KvSpan } from './regions.ts'

/** Somebody wants to know when these tokens are not cached any more. */
export interface Watch {
  id: string
  /** In tokens. */
  length: number
}

export interface PrefixNode extends Evictable {
  /** No other node has had it. */
  id: number
  parent: PrefixNode | undefined
  tenant: string
  /** What leads here from the parent. */
  tokens: Int32Array
  /** Position of the first of them. */
  from: number
  /** -1: outside of memory, as all that follows it is. */
  region: number
  /** Where its columns are outside of memory, if they are; in memory too if it has a region. */
  places: Uint32Array | undefined
  /** Its region is being filled: nobody may use it yet. */
  coming: boolean
  /** Children that have a region. */
  warm: number
  /** By their first token. */
  children: Map<number, PrefixNode>
  /** When it was last used, in milliseconds; it decides nothing. */
  usedMs: number
  /** Pinned prefixes that end here. */
  pins: number
  /** Forgotten. */
  gone: boolean
  /** Watched prefixes that end in here: they are cached for as long as this is. */
  watches: Watch[]
}

/** An end of what is in memory that no pinned prefix needs. */
export function mayGo({ parent, region, coming, warm, pins }: PrefixNode): boolean {
  return parent !== undefined && region >= 0 && !coming && warm === 0 && pins === 0
}

export function addSpan(spans: KvSpan[], span: KvSpan): void {
  const last = spans.at(-1)
  if (last?.region === span.region) last.to = span.to
  else spans.push(span)
}

export function commonLength(a: Int32Array, b: Int32Array): number {
  const length = Math.min(a.length, b.length)
  let i = 0
  while (i < length && a[i] === b[i]) i++
  return i
}
