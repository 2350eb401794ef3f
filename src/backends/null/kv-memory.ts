// Owns KV memory that holds a hash in place of keys and values, and throws where real memory would
// quietly give another sequence's, old ones, or zeros.

import { assert } from '../../assert.ts'
import type { KvLayout } from '../../kv/layout.ts'
import {
  columnsFor,
  copiedColumns,
  fullColumns,
  type KvColumns,
  type KvSpan,
  sharedColumns,
  spannedTokens,
} from '../../kv/regions.ts'
import type { KvMemory } from '../backend.ts'

const NOTHING: readonly KvColumns[] = []

interface Region {
  /** By column and row in it: the hash of all tokens up to there, in place of the row's bytes. */
  hashes: Uint32Array
  /** By column and row in it: 1 if the row's bytes of that column were written. */
  written: Uint8Array
  /** By column: 1 if it is in memory. */
  touched: Uint8Array
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

  /** Rows that may have bytes in one column. */
  private readonly columnRows: number

  constructor(layout: KvLayout, slots: number, regions = slots) {
    this.layout = layout
    this.slots = slots
    this.regions = regions
    this.columnRows = Math.ceil(layout.shape.pageBytes / layout.tokenStride) + 1
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
    const own = this.shared[slot]?.at(-1)?.end ?? 0
    assert(fullColumns(this.layout, position) >= own, `slot ${slot} writes after what it shares`)
    const before = position === 0 ? 0 : this.hashAt(slot, position - 1)
    const hash = extendHash(before, token)
    const end = columnsFor(this.layout, position + 1)
    for (let column = fullColumns(this.layout, position); column < end; column++) {
      this.write(this.own[slot] ?? 0, column, position, hash)
    }
    this.written[slot] = position + 1
  }

  /** The hash of the tokens from 0 to `position`, as attention would read them. */
  hashAt(slot: number, position: number): number {
    const held = this.written[slot] ?? 0
    assert(position < held, `slot ${slot} holds ${held} tokens when ${position} is read`)
    const end = columnsFor(this.layout, position + 1)
    let column = fullColumns(this.layout, position)
    const hash = this.read(this.regionAt(slot, column), column, position)
    while (++column < end) {
      const other = this.read(this.regionAt(slot, column), column, position)
      assert(other === hash, `row ${position} of slot ${slot} is of one sequence`)
    }
    return hash
  }

  map(slot: number, region: number, shared: readonly KvSpan[]): void {
    this.own[slot] = region
    this.shared[slot] = sharedColumns(this.layout, shared)
    this.written[slot] = spannedTokens(shared)
  }

  copy(slot: number, first: number, shared: readonly KvSpan[]): void {
    const own = this.own[slot] ?? 0
    const tokens = spannedTokens(shared)
    const columns = copiedColumns(this.layout, shared, first)
    for (const part of columns) {
      for (let column = part.first; column < part.end; column++) {
        for (const position of this.rowsIn(column, tokens)) {
          this.write(own, column, position, this.read(part.region, column, position))
        }
      }
    }
    this.written[slot] = tokens
  }

  discard(region: number, first: number, end: number): void {
    const { touched, written } = this.region(region)
    touched.fill(0, first, end)
    written.fill(0, first * this.columnRows, end * this.columnRows)
  }

  residentBytes(): number {
    let columns = 0
    for (const region of this.memory) region?.touched.forEach((touched) => (columns += touched))
    return columns * this.layout.ranges * this.layout.shape.pageBytes
  }

  /** The region where a slot has a column. */
  private regionAt(slot: number, column: number): number {
    for (const { region, first, end } of this.shared[slot] ?? NOTHING) {
      if (column >= first && column < end) return region
    }
    return this.own[slot] ?? 0
  }

  /** Positions below `tokens` whose rows have bytes in a column. */
  private *rowsIn(column: number, tokens: number): Generator<number> {
    const end = Math.min(tokens, Math.ceil(this.firstRow(column + 1)))
    for (let position = Math.floor(this.firstRow(column)); position < end; position++) {
      yield position
    }
  }

  /** The row that begins where a column does; a fraction if one lies across that border. */
  private firstRow(column: number): number {
    return (column * this.layout.shape.pageBytes) / this.layout.tokenStride
  }

  private read(region: number, column: number, position: number): number {
    const { hashes, written } = this.region(region)
    const at = this.indexOf(column, position)
    assert(written[at] === 1, `row ${position} of region ${region} is in memory`)
    return hashes[at] ?? 0
  }

  private write(region: number, column: number, position: number, hash: number): void {
    const { hashes, written, touched } = this.region(region)
    const at = this.indexOf(column, position)
    hashes[at] = hash
    written[at] = 1
    touched[column] = 1
  }

  private indexOf(column: number, position: number): number {
    return column * this.columnRows + position - Math.floor(this.firstRow(column))
  }

  private region(index: number): Region {
    assert(index >= 0 && index < this.regions, `region ${index} exists`)
    const { shape, rangeBytes } = this.layout
    const columns = rangeBytes / shape.pageBytes
    return (this.memory[index] ??= {
      hashes: new Uint32Array(columns * this.columnRows),
      written: new Uint8Array(columns * this.columnRows),
      touched: new Uint8Array(columns),
    })
  }
}

/** The hash of a sequence that was hashed to `hash` and goes on with `token` (after FNV-1a). */
export function extendHash(hash: number, token: number): number {
  const mixed = Math.imul(hash ^ token ^ 0x811c9dc5, 0x01000193)
  return (mixed ^ (mixed >>> 15)) >>> 0
}
