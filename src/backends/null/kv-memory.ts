// Owns KV memory that holds a hash in place of keys and values, and throws where real memory would
// quietly give another sequence's, old ones, or zeros, or lose what a step is reading.

import { assert, present } from '../../assert.ts'
import type { KvLayout } from '../../kv/layout.ts'
import {
  columnsFor,
  copiedColumns,
  fullColumns,
  type KvSpan,
  sharedColumns,
  spannedTokens,
} from '../../kv/regions.ts'
import type { KvTier } from '../../kv/tier.ts'
import type { KvMemory } from '../backend.ts'

/**
 * A row that lies across columns has a part in each, and each part the hash of all tokens up to the
 * row's: of a row whose parts lie in different regions, each may outlive the other.
 */
export interface NullRegion {
  /** By part of a row. */
  hashes: Uint32Array
  /** By part of a row: 1 if it is in memory. */
  present: Uint8Array
  /** By column: 1 if it is in memory. */
  touched: Uint8Array
  /** By column: 1 if it was said that it will be written. */
  grown: Uint8Array
  /** By column: 1 if a step that reads it is in flight. */
  reading: Uint8Array
}

/** What a column holds: hashes by part of a row. */
export type NullColumn = ReadonlyMap<number, number>

export class NullKvMemory implements KvMemory {
  /** Set by whoever wants one. */
  tier?: KvTier
  readonly layout: KvLayout
  readonly slots: number
  readonly regions: number
  protected readonly columns: number
  protected readonly memory: (NullRegion | undefined)[]
  /** By slot: the region where it writes, and by column the one that is mapped there. */
  protected readonly own: number[]
  protected readonly mapped: Int32Array[]
  /** By slot: columns before this one are shared. */
  protected readonly sharedEnd: Int32Array
  /** Parts of a row, at most. */
  private readonly parts: number
  /** By slot: positions that its present owner has, without a gap from 0. */
  private readonly written: Int32Array
  /** By slot: 1 if a step that reads it is in flight. */
  private readonly reading: Uint8Array
  /** Region, first and end column of each run that is read: plain numbers, so no step allocates. */
  private readonly readColumns: number[] = []
  private readEnd = 0

  constructor(layout: KvLayout, slots: number, regions = slots) {
    this.layout = layout
    this.slots = slots
    this.regions = regions
    this.columns = layout.rangeBytes / layout.shape.pageBytes
    this.parts = Math.ceil(layout.tokenStride / layout.shape.pageBytes) + 1
    this.memory = Array.from({ length: regions }, () => undefined)
    this.own = Array.from({ length: slots }, (_, slot) => slot)
    this.mapped = this.own.map((region) => new Int32Array(this.columns).fill(region))
    this.sharedEnd = new Int32Array(slots)
    this.written = new Int32Array(slots)
    this.reading = new Uint8Array(slots)
  }

  /** Writes one token's keys and values after the last; position 0 begins a new sequence. */
  append(slot: number, position: number, token: number): void {
    assert(slot >= 0 && slot < this.slots, `slot ${slot} is one of ${this.slots}`)
    assert(position < this.layout.shape.maxTokens, `position ${position} lies in the slot`)
    if (position === 0) this.written[slot] = 0
    const held = this.heldUpTo(slot, position)
    assert(position === held, `slot ${slot} holds ${held} tokens when ${position} is written`)
    const before = position === 0 ? this.origin(slot) : this.hashAt(slot, position - 1)
    const first = fullColumns(this.layout, position)
    const own = first >= (this.sharedEnd[slot] ?? 0)
    assert(own, `slot ${slot} writes nothing that others read`)
    const end = columnsFor(this.layout, position + 1)
    const hash = extendHash(before, token)
    for (let c = first; c < end; c++) this.put(this.own[slot] ?? 0, position, c, hash)
    this.written[slot] = position + 1
  }

  /** The hash of the tokens from 0 to `position`, as attention would read them. */
  hashAt(slot: number, position: number): number {
    const held = this.written[slot] ?? 0
    assert(position < held, `slot ${slot} holds ${held} tokens when ${position} is read`)
    const first = fullColumns(this.layout, position)
    const end = columnsFor(this.layout, position + 1)
    let hash: number | undefined
    for (let c = first; c < end; c++) {
      const { hashes, present } = this.region(this.mapped[slot]?.[c] ?? 0)
      const part = position * this.parts + c - first
      assert(present[part] === 1, 'what is read is in memory')
      assert(hash === undefined || hash === hashes[part], 'the parts of a row belong together')
      hash = hashes[part]
    }
    return hash ?? 0
  }

  map(slot: number, region: number, shared: readonly KvSpan[]): void {
    assert(this.reading[slot] === 0, `slot ${slot} is mapped while no step reads it`)
    const mapped = present(this.mapped[slot], 'a slot')
    this.own[slot] = region
    mapped.fill(region)
    let boundary = 0
    for (const part of sharedColumns(this.layout, shared)) {
      assert(part.first === boundary, `slot ${slot} is mapped without gaps`)
      mapped.fill(part.region, part.first, part.end)
      boundary = part.end
    }
    this.sharedEnd[slot] = boundary
    this.written[slot] = spannedTokens(shared)
  }

  copy(slot: number, first: number, shared: readonly KvSpan[]): void {
    const tokens = spannedTokens(shared)
    for (const part of copiedColumns(this.layout, shared, first)) {
      for (let column = part.first; column < part.end; column++) {
        this.copyColumn(part.region, this.own[slot] ?? 0, column, tokens)
      }
    }
    this.written[slot] = tokens
  }

  grow(region: number, first: number, end: number): void {
    this.region(region).grown.fill(1, first, end)
  }

  discard(region: number, first: number, end: number): void {
    const { touched, grown, present, reading } = this.region(region)
    const read = reading.indexOf(1, first)
    assert(
      read < 0 || read >= end,
      `column ${read} of region ${region} goes while no step reads it`,
    )
    touched.fill(0, first, end)
    grown.fill(0, first, end)
    for (let c = first; c < end; c++) this.partsOf(c, (part) => (present[part] = 0))
  }

  /** A column that is in memory, as a tier takes it out. */
  column(index: number, column: number): NullColumn {
    const { hashes, present, touched } = this.region(index)
    assert(touched[column] === 1, `column ${column} of region ${index} is in memory`)
    const parts = new Map<number, number>()
    this.partsOf(column, (part) => {
      if (present[part] === 1) parts.set(part, hashes[part] ?? 0)
    })
    return parts
  }

  /** Fills a column that is not in memory, as a tier brings it back. */
  restore(index: number, column: number, parts: NullColumn): void {
    const { hashes, present, touched } = this.region(index)
    assert(touched[column] === 0, `column ${column} of region ${index} is not in memory`)
    touched[column] = 1
    // What an earlier owner of the region wrote to its slot has gone.
    const row = Math.floor((column * this.layout.shape.pageBytes) / this.layout.tokenStride)
    const slot = this.own.indexOf(index)
    if (slot >= 0) this.written[slot] = Math.min(this.written[slot] ?? 0, row)
    for (const [part, hash] of parts) {
      hashes[part] = hash
      present[part] = 1
    }
  }

  isAbsent(index: number, column: number): boolean {
    return this.region(index).touched[column] === 0
  }

  residentBytes(): number {
    let columns = 0
    for (const region of this.memory) region?.touched.forEach((touched) => (columns += touched))
    return columns * this.layout.ranges * this.layout.shape.pageBytes
  }

  /** A step is launched that reads the first `tokens` tokens of a slot, at any moment from now. */
  beginReading(slot: number, tokens: number): void {
    this.reading[slot] = 1
    const end = columnsFor(this.layout, tokens)
    for (let c = 0; c < end; c++) {
      const region = this.mapped[slot]?.[c] ?? 0
      this.region(region).reading[c] = 1
      const { readColumns: runs, readEnd: at } = this
      if (at > 0 && runs[at - 3] === region && runs[at - 1] === c) {
        runs[at - 1] = c + 1
        continue
      }
      runs[at] = region
      runs[at + 1] = c
      runs[at + 2] = c + 1
      this.readEnd = at + 3
    }
  }

  /** All launched steps are over: this is their fence. */
  endReading(): void {
    for (let i = 0; i < this.readEnd; i += 3) {
      const { reading } = this.region(this.readColumns[i] ?? 0)
      reading.fill(0, this.readColumns[i + 1], this.readColumns[i + 2])
    }
    this.readEnd = 0
    this.reading.fill(0)
  }

  /** The hash of no tokens, from which a slot's sequence goes on. */
  protected origin(_slot: number): number {
    return 0
  }

  /** Whether a region has every part of a row, all of them with this hash. */
  protected holds(index: number, position: number, hash: number): boolean {
    const { hashes, present } = this.region(index)
    const first = fullColumns(this.layout, position)
    const end = columnsFor(this.layout, position + 1)
    for (let c = first; c < end; c++) {
      const part = position * this.parts + c - first
      if (present[part] !== 1 || hashes[part] !== hash) return false
    }
    return true
  }

  /** Tokens that a slot holds, as far as `position`: those it wrote, then those brought back. */
  private heldUpTo(slot: number, position: number): number {
    let held = this.written[slot] ?? 0
    while (held < position && this.isWhole(slot, held)) held++
    this.written[slot] = held
    return held
  }

  private isWhole(slot: number, position: number): boolean {
    const first = fullColumns(this.layout, position)
    const end = columnsFor(this.layout, position + 1)
    for (let c = first; c < end; c++) {
      const { present } = this.region(this.mapped[slot]?.[c] ?? 0)
      if (present[position * this.parts + c - first] !== 1) return false
    }
    return true
  }

  protected region(index: number): NullRegion {
    assert(index >= 0 && index < this.regions, `region ${index} exists`)
    const parts = this.layout.shape.maxTokens * this.parts
    return (this.memory[index] ??= {
      hashes: new Uint32Array(parts),
      present: new Uint8Array(parts),
      touched: new Uint8Array(this.columns),
      grown: new Uint8Array(this.columns),
      reading: new Uint8Array(this.columns),
    })
  }

  /** Copies what the first `tokens` tokens have of a column, as far as it was written. */
  private copyColumn(from: number, to: number, column: number, tokens: number): void {
    const source = this.region(from)
    assert(source.touched[column] === 1, `column ${column} of region ${from} is in memory`)
    this.partsOf(column, (part, position) => {
      if (position >= tokens) return
      assert(source.present[part] === 1, `position ${position} of region ${from} is in memory`)
      this.put(to, position, column, source.hashes[part] ?? 0)
    })
  }

  /** Writes the part of a row that lies in a column. */
  protected put(index: number, position: number, column: number, hash: number): void {
    const region = this.region(index)
    const part = position * this.parts + column - fullColumns(this.layout, position)
    const overwritten = region.present[part] === 1 && region.reading[column] === 1
    assert(
      !overwritten,
      `column ${column} of region ${index} is overwritten while no step reads it`,
    )
    assert(region.grown[column] === 1, 'a column was grown before it is written')
    region.hashes[part] = hash
    region.present[part] = 1
    region.touched[column] = 1
  }

  /** Calls `act` for each part of a row that lies in a column. */
  private partsOf(column: number, act: (part: number, position: number) => void): void {
    const { shape, tokenStride } = this.layout
    const from = Math.floor((column * shape.pageBytes) / tokenStride)
    const end = Math.ceil(((column + 1) * shape.pageBytes) / tokenStride)
    for (let position = from; position < end && position < shape.maxTokens; position++) {
      act(position * this.parts + column - fullColumns(this.layout, position), position)
    }
  }
}

/** The hash of a sequence that was hashed to `hash` and goes on with `token` (after FNV-1a). */
export function extendHash(hash: number, token: number): number {
  const mixed = Math.imul(hash ^ token ^ 0x811c9dc5, 0x01000193)
  return (mixed ^ (mixed >>> 15)) >>> 0
}
