// Owns the order in which cached prefixes go. Only ends of the tree can go; they are kept in two
// heaps, so that finding the next costs O(log n) however many there are:
//
//   loose   whatever may give memory back
//   held    whatever was seen to give none: sequences use all of its pages
//
// A sequence that lets go of a region's pages makes what is held there loose again.

import { assert } from '../assert.ts'
import type { EvictionPolicy, PrefixUse } from './eviction.ts'
import { before, type HeapItem, MinHeap } from './heap.ts'
import { type KvColumns, type RegionTable, spannedColumns } from './regions.ts'

/** What of a cached prefix decides when it goes. */
export interface Evictable extends PrefixUse, HeapItem {
  parent: Evictable | undefined
  tokens: Int32Array
  region: number
  /** What the last one that went was worth when this was last used. */
  base: number
}

export class EvictionQueue<T extends Evictable> {
  private readonly regions: RegionTable
  private readonly policy: EvictionPolicy
  private readonly loose = new MinHeap<T>()
  private readonly held = new MinHeap<T>()
  /** Those of `held`, by region. */
  private readonly heldIn = new Map<number, Set<T>>()
  private age = 0

  constructor(regions: RegionTable, policy: EvictionPolicy) {
    this.regions = regions
    this.policy = policy
  }

  get size(): number {
    return this.loose.items.length + this.held.items.length
  }

  /** An end of the tree that may go. */
  add(leaf: T): void {
    this.loose.add(leaf)
  }

  /** It is gone, no longer an end, or must not go. */
  remove(leaf: T): void {
    this.heapOf(leaf).remove(leaf)
    const held = this.heldIn.get(leaf.region)
    if (held?.delete(leaf) && held.size === 0) this.heldIn.delete(leaf.region)
  }

  has(prefix: T): boolean {
    return prefix.heapIndex >= 0
  }

  /** A prefix was used or has become another: it is worth what it is now. */
  used(prefix: T): void {
    prefix.base = this.policy.ages ? this.age : 0
    this.revalue(prefix)
  }

  /** Its tokens are fewer than they were. */
  revalue(prefix: T): void {
    const { first, end } = columnsOf(this.regions, prefix)
    this.setValue(prefix, (end - first) * this.regions.layout.ranges)
  }

  /** What of all goes first, whether memory comes back with it or not. */
  get first(): T | undefined {
    const { first: loose } = this.loose
    const { first: held } = this.held
    return loose && held ? (before(loose, held) ? loose : held) : (loose ?? held)
  }

  /**
   * What goes first if memory is to come back; there must be pages that only cached prefixes refer
   * to. A prefix that lies within a page of what leads to it gives nothing back by itself, but
   * nothing of that page would come back before it has gone.
   */
  firstToFree(): T {
    this.loosen()
    for (;;) {
      const leaf = this.loose.first
      if (!leaf) return this.obstacle()
      const columns = [columnsOf(this.regions, leaf)]
      if (this.regions.evictableIn(columns) === 0) {
        this.hold(leaf)
        continue
      }
      const pages = this.regions.freedBy(columns)
      const before = leaf.value
      if (pages > 0) this.setValue(leaf, pages)
      if (leaf.value <= before) return leaf
    }
  }

  /** Says that a prefix has gone for what it was worth. */
  went(prefix: T): void {
    this.age = Math.max(this.age, prefix.value)
  }

  check(): void {
    for (const heap of [this.loose, this.held]) {
      heap.items.forEach((leaf, i) => {
        assert(leaf.heapIndex === i, 'a prefix knows its place in the queue')
        const parent = heap.items[(i - 1) >> 1]
        assert(i === 0 || (parent && !before(leaf, parent)), 'who is worth less is further ahead')
        const held = this.heldIn.get(leaf.region)?.has(leaf) ?? false
        assert(held === (heap === this.held), 'what is held is found by its region')
      })
    }
  }

  private setValue(prefix: T, pages: number): void {
    prefix.value = prefix.base + this.policy.worth(prefix, pages)
    if (prefix.heapIndex >= 0) this.heapOf(prefix).moved(prefix)
  }

  private hold(leaf: T): void {
    this.loose.remove(leaf)
    this.held.add(leaf)
    const held = this.heldIn.get(leaf.region)
    if (held) held.add(leaf)
    else this.heldIn.set(leaf.region, new Set([leaf]))
  }

  private loosen(): void {
    for (const region of this.regions.loosened) {
      for (const leaf of this.heldIn.get(region) ?? []) {
        this.held.remove(leaf)
        this.loose.add(leaf)
      }
      this.heldIn.delete(region)
    }
    this.regions.loosened.clear()
  }

  /**
   * What stands before memory that only cached prefixes use: an end whose own pages a sequence
   * computed again for itself. Rare, and no more than sequences run, so that all are looked at.
   */
  private obstacle(): T {
    let found: T | undefined
    for (const leaf of this.held.items) {
      if ((!found || before(leaf, found)) && this.frees(leaf.parent)) found = leaf
    }
    assert(found, 'pages that only cached prefixes use come back if these go')
    return found
  }

  private frees(prefix: Evictable | undefined): boolean {
    for (let at = prefix; at?.parent; at = at.parent) {
      if (this.regions.evictableIn([columnsOf(this.regions, at)]) > 0) return true
    }
    return false
  }

  private heapOf(leaf: T): MinHeap<T> {
    return this.heldIn.get(leaf.region)?.has(leaf) ? this.held : this.loose
  }
}

/** Every column that holds a byte of a prefix's own tokens. */
export function columnsOf(
  { layout }: RegionTable,
  { region, from, tokens }: Pick<Evictable, 'region' | 'from' | 'tokens'>,
): KvColumns {
  const [columns] = spannedColumns(layout, [{ region, from, to: from + tokens.length }])
  assert(columns, 'a span has columns')
  return columns
}
