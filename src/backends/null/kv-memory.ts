// Owns KV memory that holds a hash in place of keys and values, and throws where real memory would
// quietly give another sequence's, old ones, or zeros.

import { assert } from '../../assert.ts'
import type { KvLayout } from '../../kv/layout.ts'
import {
  columnsFor,
  fullColumns,
  type KvColumns,
  type KvSpan,
  shareableColumns,
  sharedColumns,
  spannedTokens,
} from '../../kv/regions.ts'
import type { KvMemory } from '../backend.ts'

interface Region {
  /** By position: the hash of all tokens up to there. */
  hashes: Uint32Array
  /** By position: 1 if every byte of it is in memory. */
  whole: Uint8Array
  /** By column: 1 if it is in memory. */
  touched: Uint8Array
  /** By column: 1 if it was said that it will be written. */
  grown: Uint8Array
}

export class NullKvMemory implements KvMemory {
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
    const held = this.written[slot] ?? 0
    assert(position === held, `slot ${slot} holds ${held} tokens when ${position} is written`)
    const before = position === 0 ? 0 : this.hashAt(slot, position - 1)
    this.put(this.own[slot] ?? 0, position, extendHash(before, token))
    this.written[slot] = position + 1
  }

  /** The hash of the tokens from 0 to `position`, as attention would read them. */
  hashAt(slot: number, position: number): number {
    const held = this.written[slot] ?? 0
    assert(position < held, `slot ${slot} holds ${held} tokens when ${position} is read`)
    // A row lies where its last byte lies; its first bytes may be in a column before.
    const column = columnsFor(this.layout, position + 1) - 1
    let region = this.own[slot] ?? 0
    for (const part of this.shared[slot] ?? []) {
      if (column >= part.first && column < part.end) region = part.region
    }
    const { hashes, whole } = this.region(region)
    assert(whole[position] === 1, 'what is read is in memory')
    return hashes[position] ?? 0
  }

  map(slot: number, region: number, shared: readonly KvSpan[]): void {
    this.own[slot] = region
    this.shared[slot] = sharedColumns(this.layout, shared)
    const tokens = spannedTokens(shared)
    this.written[slot] = tokens
    const boundary = shareableColumns(this.layout, tokens)
    const from = shared.at(-1)
    for (let position = tokens - 1; from && position >= 0; position--) {
      if (columnsFor(this.layout, position + 1) <= boundary) break
      const { hashes, whole } = this.region(from.region)
      assert(whole[position] === 1, `position ${position} of region ${from.region} is in memory`)
      this.put(region, position, hashes[position] ?? 0, boundary)
    }
  }

  grow(region: number, first: number, end: number): void {
    this.region(region).grown.fill(1, first, end)
  }

  discard(region: number, first: number, end: number): void {
    const { touched, whole, grown } = this.region(region)
    touched.fill(0, first, end)
    grown.fill(0, first, end)
    for (let position = 0; position < whole.length; position++) {
      const inside =
        columnsFor(this.layout, position + 1) > first && fullColumns(this.layout, position) < end
      if (inside) whole[position] = 0
    }
  }

  residentBytes(): number {
    let columns = 0
    for (const region of this.memory) region?.touched.forEach((touched) => (columns += touched))
    return columns * this.layout.ranges * this.layout.shape.pageBytes
  }

  /** Writes a row, as far as it lies in `firstColumn` and after. */
  private put(region: number, position: number, hash: number, firstColumn = 0): void {
    const { hashes, whole, touched, grown } = this.region(region)
    hashes[position] = hash
    whole[position] = 1
    const end = columnsFor(this.layout, position + 1)
    const first = Math.max(firstColumn, fullColumns(this.layout, position))
    for (let c = first; c < end; c++) {
      assert(grown[c] === 1, `column ${c} of region ${region} was grown before it is written`)
      touched[c] = 1
    }
  }

  private region(index: number): Region {
    assert(index >= 0 && index < this.regions, `region ${index} exists`)
    const { shape, rangeBytes } = this.layout
    return (this.memory[index] ??= {
      hashes: new Uint32Array(shape.maxTokens),
      whole: new Uint8Array(shape.maxTokens),
      touched: new Uint8Array(rangeBytes / shape.pageBytes),
      grown: new Uint8Array(rangeBytes / shape.pageBytes),
    })
  }
}

/** The hash of a sequence that was hashed to `hash` and goes on with `token` (after FNV-1a). */
export function extendHash(hash: number, token: number): number {
  const mixed = Math.imul(hash ^ token ^ 0x811c9dc5, 0x01000193)
  return (mixed ^ (mixed >>> 15)) >>> 0
}
