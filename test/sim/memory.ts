// Owns the simulated memory: hashes in place of keys and values, salted by tenant, under the eyes
// of a reader that reads all of a sequence as attention would.

import { assert } from '../../src/assert.ts'
import { extendHash, type NullColumn, NullKvMemory } from '../../src/backends/null/kv-memory.ts'
import { shareableColumns, type KvSpan, spannedTokens } from '../../src/kv/regions.ts'
import type { ContendedColumns } from './contended.ts'
import type { GpuShadow } from './gpu-shadow.ts'
import type { Insides } from './insides.ts'

/** What a sequence of no tokens hashes to: another number for each tenant. */
export function saltOf(tenant: string): number {
  let salt = 1
  for (const character of tenant) salt = extendHash(salt, character.codePointAt(0) ?? 0)
  return salt
}

/** A hash over the hashes of the first `count` tokens: what attention over all of them gives. */
export function digestOf(salt: number, tokens: ArrayLike<number>, count: number): number {
  let [hash, digest] = [salt, salt]
  for (let t = 0; t < count; t++) {
    hash = extendHash(hash, tokens[t] ?? 0)
    digest = extendHash(digest, hash)
  }
  return digest
}

export class SimMemory extends NullKvMemory {
  /** Set where the memory is a GPU's. */
  shadow?: GpuShadow
  /** Set where another process takes memory, too. */
  contended?: ContendedColumns
  /** Columns that were brought back to where there was no memory. */
  broughtBackInVain = 0
  /** By slot: the salt of the tenant whose sequence is in it. */
  readonly salts: Uint32Array = new Uint32Array(this.slots)
  /** Called before memory is moved; may throw, as a kernel out of mappings does. */
  onMove: (what: 'map' | 'copy' | 'discard') => void = () => {}

  override map(slot: number, region: number, shared: readonly KvSpan[]): void {
    this.onMove('map')
    const first = shareableColumns(this.layout, spannedTokens(shared))
    const dirty = this.region(region).touched.indexOf(1, first)
    const inPlace = this.own[slot] === region
    assert(
      dirty < 0 || inPlace,
      `column ${dirty} of region ${region} is zeroed before it is used again`,
    )
    super.map(slot, region, shared)
    this.shadow?.kv.map(slot, region, shared)
  }

  override copy(slot: number, first: number, shared: readonly KvSpan[]): void {
    this.onMove('copy')
    super.copy(slot, first, shared)
    this.shadow?.kv.copy(slot, first, shared)
  }

  override discard(region: number, first: number, end: number): void {
    this.onMove('discard')
    super.discard(region, first, end)
    this.shadow?.kv.discard(region, first, end)
    this.contended?.discard(region, first, end)
  }

  override grow(region: number, first: number, end: number): void {
    super.grow(region, first, end)
    this.shadow?.kv.grow(region, first, end)
    this.contended?.grow(region, first, end)
  }

  get inPlace(): boolean {
    return this.shadow !== undefined
  }

  expect(region: number, first: number, end: number): void {
    this.shadow?.kv.expect(region, first, end)
  }

  unshare(region: number): void {
    this.shadow?.kv.unshare(region)
  }

  settle(nowMs: number): number | undefined {
    return this.shadow?.kv.settle(nowMs)
  }

  override restore(region: number, column: number, parts: NullColumn): void {
    if (!this.lost(region, column)) return super.restore(region, column, parts)
    this.broughtBackInVain++
    super.restore(region, column, new Map([...parts].map(([part, hash]) => [part, ~hash])))
  }

  protected override put(region: number, position: number, column: number, hash: number): void {
    super.put(region, position, column, this.lost(region, column) ? ~hash : hash)
  }

  /** There is no memory for it: nobody finds what is written there. */
  private lost(region: number, column: number): boolean {
    return this.contended !== undefined && !this.contended.isThere(region, column)
  }

  /** A hash over what all of a slot's rows up to `tokens` hold, read wherever they are mapped. */
  digest(slot: number, tokens: number): number {
    let digest = this.salts[slot] ?? 0
    for (let t = 0; t < tokens; t++) digest = extendHash(digest, this.hashAt(slot, t))
    return digest
  }

  /**
   * Throws unless a region holds these tokens whole, the first at position `from`.
   * @returns the hash of all tokens up to there, given that of those before
   */
  checkRows(region: number, from: number, tokens: Int32Array, before: number): number {
    let hash = before
    for (let i = 0; i < tokens.length; i++) {
      hash = extendHash(hash, tokens[i] ?? 0)
      const kept = this.holds(region, from + i, hash)
      assert(kept, `position ${from + i} of region ${region} keeps what is cached`)
    }
    return hash
  }

  /** Throws if a page is in memory that the table does not count: it was not given back. */
  checkCounted(regions: Insides['regions']): void {
    this.memory.forEach((region, r) => {
      if (!region) return
      for (let c = region.touched.indexOf(1); c >= 0; c = region.touched.indexOf(1, c + 1)) {
        assert(
          (regions[r]?.live[c] ?? 0) + (regions[r]?.cache[c] ?? 0) > 0,
          `column ${c} of region ${r} is in memory and counted`,
        )
      }
    })
  }

  /** Throws unless a slot writes to `region` and reads `shared` before that. */
  checkMapped(slot: number, region: number, shared: readonly KvSpan[]): void {
    assert(this.own[slot] === region, `slot ${slot} is mapped to region ${region}`)
    const whole = shareableColumns(this.layout, spannedTokens(shared))
    const mapped = this.sharedEnd[slot] === whole
    assert(mapped, `slot ${slot} is mapped to the ${whole} columns that it shares`)
  }

  protected override origin(slot: number): number {
    return this.salts[slot] ?? 0
  }
}
