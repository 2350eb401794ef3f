// Owns KV memory that holds a hash in place of keys and values, and throws where real memory would
// quietly give another sequence's, old ones, or zeros.

import { assert } from '../../assert.ts'
import { type KvLayout, pagesFor } from '../../kv/layout.ts'
import type { KvMemory } from '../backend.ts'

export class NullKvMemory implements KvMemory {
  readonly layout: KvLayout
  readonly slots: number
  /** By slot and position: the hash of all tokens up to there. */
  private readonly hashes: Uint32Array
  /** Positions that the slot's present owner has written, without a gap from 0. */
  private readonly written: Int32Array
  /** Positions written by any owner since the slot was released. */
  private readonly touched: Int32Array

  constructor(layout: KvLayout, slots: number) {
    this.layout = layout
    this.slots = slots
    this.hashes = new Uint32Array(slots * layout.shape.maxTokens)
    this.written = new Int32Array(slots)
    this.touched = new Int32Array(slots)
  }

  /** Writes one token's keys and values after the last; position 0 begins a new sequence. */
  append(slot: number, position: number, token: number): void {
    assert(slot >= 0 && slot < this.slots, `slot ${slot} is one of ${this.slots}`)
    assert(position < this.layout.shape.maxTokens, `position ${position} lies in the slot`)
    if (position === 0) this.written[slot] = 0
    const held = this.written[slot] ?? 0
    assert(position === held, `slot ${slot} holds ${held} tokens when ${position} is written`)
    const before = position === 0 ? 0 : this.hashAt(slot, position - 1)
    this.hashes[slot * this.layout.shape.maxTokens + position] = extendHash(before, token)
    this.written[slot] = position + 1
    this.touched[slot] = Math.max(this.touched[slot] ?? 0, position + 1)
  }

  /** The hash of the tokens from 0 to `position`, as attention would read them. */
  hashAt(slot: number, position: number): number {
    const held = this.written[slot] ?? 0
    assert(position < held, `slot ${slot} holds ${held} tokens when ${position} is read`)
    return this.hashes[slot * this.layout.shape.maxTokens + position] ?? 0
  }

  release(slot: number): void {
    this.written[slot] = 0
    this.touched[slot] = 0
  }

  residentBytes(): number {
    let pages = 0
    for (const tokens of this.touched) pages += pagesFor(this.layout, tokens)
    return pages * this.layout.shape.pageBytes
  }
}

/** The hash of a sequence that was hashed to `hash` and goes on with `token` (after FNV-1a). */
export function extendHash(hash: number, token: number): number {
  const mixed = Math.imul(hash ^ token ^ 0x811c9dc5, 0x01000193)
  return (mixed ^ (mixed >>> 15)) >>> 0
}
