// Owns KV memory that holds a hash in place of keys and values, and throws where real memory would
// quietly give another sequence's, old ones, or zeros.

import { assert } from '../../assert.ts'
import type { KvLayout } from '../../kv/layout.ts'
import {
  columnsFor,
  fullColumns,
  type KvColumns,
  type KvSpan,
  sharedColumns,
  spannedTokens,
} from '../../kv/regions.ts'
import type { KvTier } from '../../kv/tier.ts'
import type { KvMemory } from '../backend.ts'

interface Region {
  /** By position: the hash of all tokens up to there. */
  hashes: Uint32Array
  /** By position: 1 if the column that it ends in has it. */
  whole: Uint8Array
  /** By column: 1 if it is in memory. */
  touched: Uint8Array
}

/** What a column holds: the hashes of rows that end in it, by position. */
export type NullColumn = ReadonlyMap<number, number>

export class NullKvMemory implements KvMemory {
  /** Set by whoever wants one. */
  tier?: KvTier
  readonly layout: KvLayout
  readonly slots: number
  readonly regions: number
  private readonly memory: (Region | undefined)[]
  /** By slot: the region where it writes, and whose columns it has before that. */
  private readonly own: number[]
  private readonly shared: (readonly KvColumns[])[]
  /** By slot: positions that its present owner has, without a gap from 0. */
  private readonly written: Int32Array

  constructor(layout: KvLayout, slots: number, regions = slots) {
    this.layout = layout
    this.slots = slots
    this.regions = regions
    this.memory = Array.from({ length: regions }, () => undefined)
    this.own = Array.from({ length: slots }, (_, slot) => slot)
    this.shared = Array.from({ length: slots }, () => [])
    this.written = new Int32Array(slots)
  }

  /** Writes one token's keys and values after the last; position 0 begins a new sequence. */
  append(slot: number, position: number, token: number): void {
    assert(slot >= 0 && slot < this.slots, `slot ${slot} is one of ${this.slots}`)
    assert(position < this.layout.shape.maxTokens, `position ${position} lies in the slot`)
    if (position === 0) {
      assert(this.shared[slot]?.length === 0, `slot ${slot} writes nothing that others read`)
      this.written[slot] = 0
    }
    const held = this.heldUpTo(slot, position)
    assert(position === held, `slot ${slot} holds ${held} tokens when ${position} is written`)
    const before = position === 0 ? 0 : this.hashAt(slot, position - 1)
    this.put(this.own[slot] ?? 0, position, extendHash(before, token))
    this.written[slot] = position + 1
  }

  /** The hash of the tokens from 0 to `position`, as attention would read them. */
  hashAt(slot: number, position: number): number {
    const held = this.written[slot] ?? 0
    assert(position < held, `slot ${slot} holds ${held} tokens when ${position} is read`)
    const { hashes, whole } = this.regionAt(slot, this.columnOf(position))
    assert(whole[position] === 1, 'what is read is in memory')
    for (let c = fullColumns(this.layout, position); c < this.columnOf(position); c++) {
      assert(this.regionAt(slot, c).touched[c] === 1, 'what is read begins in memory')
    }
    return hashes[position] ?? 0
  }

  map(slot: number, region: number, shared: readonly KvSpan[]): void {
    this.own[slot] = region
    this.shared[slot] = sharedColumns(this.layout, shared)
    const tokens = spannedTokens(shared)
    this.written[slot] = tokens
    const boundary = fullColumns(this.layout, tokens)
    const from = shared.at(-1)
    for (let position = tokens - 1; from && position >= 0; position--) {
      if (columnsFor(this.layout, position + 1) <= boundary) break
      const { hashes, whole } = this.region(from.region)
      assert(whole[position] === 1, `position ${position} of region ${from.region} is in memory`)
      this.put(region, position, hashes[position] ?? 0, boundary)
    }
  }

  discard(region: number, first: number, end: number): void {
    const { touched, whole } = this.region(region)
    touched.fill(0, first, end)
    for (let position = 0; position < whole.length; position++) {
      const column = this.columnOf(position)
      if (column >= first && column < end) whole[position] = 0
    }
  }

  /** A column that is in memory, as a tier takes it out. */
  column(region: number, column: number): NullColumn {
    const { hashes, whole, touched } = this.region(region)
    assert(touched[column] === 1, `column ${column} of region ${region} is in memory`)
    const rows = new Map<number, number>()
    for (let p = 0; p < whole.length; p++) {
      if (whole[p] === 1 && this.columnOf(p) === column) rows.set(p, hashes[p] ?? 0)
    }
    return rows
  }

  /** Fills a column that is not in memory, as a tier brings it back. */
  restore(region: number, column: number, rows: NullColumn): void {
    const { hashes, whole, touched } = this.region(region)
    assert(touched[column] === 0, `column ${column} of region ${region} is not in memory`)
    touched[column] = 1
    for (const [position, hash] of rows) {
      hashes[position] = hash
      whole[position] = 1
    }
  }

  isAbsent(region: number, column: number): boolean {
    return this.region(region).touched[column] === 0
  }

  residentBytes(): number {
    let columns = 0
    for (const region of this.memory) region?.touched.forEach((touched) => (columns += touched))
    return columns * this.layout.ranges * this.layout.shape.pageBytes
  }

  /** Writes a row, as far as it lies in `firstColumn` and after. */
  private put(region: number, position: number, hash: number, firstColumn = 0): void {
    const { hashes, whole, touched } = this.region(region)
    hashes[position] = hash
    whole[position] = 1
    const end = columnsFor(this.layout, position + 1)
    const first = Math.max(firstColumn, fullColumns(this.layout, position))
    for (let c = first; c < end; c++) touched[c] = 1
  }

  /** Tokens that a slot holds, as far as `position`: those it wrote, then those brought back. */
  private heldUpTo(slot: number, position: number): number {
    let held = this.written[slot] ?? 0
    while (held < position && this.regionAt(slot, this.columnOf(held)).whole[held] === 1) held++
    this.written[slot] = held
    return held
  }

  /** The region whose column a slot reads. */
  private regionAt(slot: number, column: number): Region {
    let region = this.own[slot] ?? 0
    for (const part of this.shared[slot] ?? []) {
      if (column >= part.first && column < part.end) region = part.region
    }
    return this.region(region)
  }

  /** A row lies where its last byte lies; its first bytes may be in a column before. */
  private columnOf(position: number): number {
    return columnsFor(this.layout, position + 1) - 1
  }

  private region(index: number): Region {
    assert(index >= 0 && index < this.regions, `region ${index} exists`)
    const { shape, rangeBytes } = this.layout
    return (this.memory[index] ??= {
      hashes: new Uint32Array(shape.maxTokens),
      whole: new Uint8Array(shape.maxTokens),
      touched: new Uint8Array(rangeBytes / shape.pageBytes),
    })
  }
}

/** The hash of a sequence that was hashed to `hash` and goes on with `token` (after FNV-1a). */
export function extendHash(hash: number, token: number): number {
  const mixed = Math.imul(hash ^ token ^ 0x811c9dc5, 0x01000193)
  return (mixed ^ (mixed >>> 15)) >>> 0
}
