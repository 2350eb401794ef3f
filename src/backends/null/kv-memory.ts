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
import type { KvMemory } from '../backend.ts'

export interface NullRegion {
  /** By position: the hash of all tokens up to there. */
  hashes: Uint32Array
  /** By position: 1 if every byte of it is in memory. */
  whole: Uint8Array
  /** By column: 1 if it is in memory. */
  touched: Uint8Array
  /** By column: 1 if a step that reads it is in flight. */
  reading: Uint8Array
}

export class NullKvMemory implements KvMemory {
  readonly layout: KvLayout
  readonly slots: number
  readonly regions: number
  protected readonly memory: (NullRegion | undefined)[]
  /** By slot: the region where it writes, and whose columns it has before that. */
  protected readonly own: number[]
  protected readonly shared: (readonly KvColumns[])[]
  /** By slot: positions that its present owner has, without a gap from 0. */
  private readonly written: Int32Array
  /** By slot: 1 if a step that reads it is in flight. */
  private readonly reading: Uint8Array
  private readonly readColumns: KvColumns[] = []

  constructor(layout: KvLayout, slots: number, regions = slots) {
    this.layout = layout
    this.slots = slots
    this.regions = regions
    this.memory = Array.from({ length: regions }, () => undefined)
    this.own = Array.from({ length: slots }, (_, slot) => slot)
    this.shared = Array.from({ length: slots }, () => [])
    this.written = new Int32Array(slots)
    this.reading = new Uint8Array(slots)
  }

  /** A step is launched that reads the first `tokens` tokens of a slot, at any moment from now. */
  beginReading(slot: number, tokens: number): void {
    this.reading[slot] = 1
    const end = columnsFor(this.layout, tokens)
    let first = 0
    for (const part of this.shared[slot] ?? []) {
      this.read(part.region, part.first, Math.min(part.end, end))
      first = part.end
    }
    this.read(this.own[slot] ?? 0, first, end)
  }

  /** All launched steps are over: this is their fence. */
  endReading(): void {
    for (const { region, first, end } of this.readColumns) {
      this.region(region).reading.fill(0, first, end)
    }
    this.readColumns.length = 0
    this.reading.fill(0)
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
    const before = position === 0 ? this.origin(slot) : this.hashAt(slot, position - 1)
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
    assert(this.reading[slot] === 0, `slot ${slot} is mapped while no step reads it`)
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
    const { touched, whole, reading } = this.region(region)
    const read = reading.indexOf(1, first)
    assert(
      read < 0 || read >= end,
      `column ${read} of region ${region} goes while no step reads it`,
    )
    touched.fill(0, first, end)
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

  /** The hash of no tokens, from which a slot's sequence goes on. */
  protected origin(_slot: number): number {
    return 0
  }

  private read(index: number, first: number, end: number): void {
    if (end <= first) return
    this.readColumns.push({ region: index, first, end })
    this.region(index).reading.fill(1, first, end)
  }

  /** Writes a row, as far as it lies in `firstColumn` and after. */
  private put(region: number, position: number, hash: number, firstColumn = 0): void {
    const { hashes, whole, touched, reading } = this.region(region)
    const end = columnsFor(this.layout, position + 1)
    const first = Math.max(firstColumn, fullColumns(this.layout, position))
    for (let c = first; c < end; c++) {
      assert(whole[position] === 0 || reading[c] === 0, 'what is overwritten is not being read')
      touched[c] = 1
    }
    hashes[position] = hash
    whole[position] = 1
  }

  protected region(index: number): NullRegion {
    assert(index >= 0 && index < this.regions, `region ${index} exists`)
    const { shape, rangeBytes } = this.layout
    return (this.memory[index] ??= {
      hashes: new Uint32Array(shape.maxTokens),
      whole: new Uint8Array(shape.maxTokens),
      touched: new Uint8Array(rangeBytes / shape.pageBytes),
      reading: new Uint8Array(rangeBytes / shape.pageBytes),
    })
  }
}

/** The hash of a sequence that was hashed to `hash` and goes on with `token` (after FNV-1a). */
export function extendHash(hash: number, token: number): number {
  const mixed = Math.imul(hash ^ token ^ 0x811c9dc5, 0x01000193)
  return (mixed ^ (mixed >>> 15)) >>> 0
}
