// Owns which cached prefixes outlive the process: every one that ends somewhere is written out soon
// after it was computed, and remembered in the store as a whole, from its first token to its end.
// What loses a place on disk is forgotten there before that place is used again.

import { assert } from '../assert.ts'
import type { ColdPrefixes } from './cold.ts'
import { columnsOf } from './eviction-queue.ts'
import type { PrefixCache } from './prefix.ts'
import type { PrefixNode } from './prefix-node.ts'
import type { RegionTable } from './regions.ts'
import type { KvStore } from './tier.ts'
import type { Transfers } from './transfers.ts'

interface Kept {
  id: number
  durable: boolean
  places: Uint32Array
}

export class KeptPrefixes {
  /** Something is in memory only, and cannot be written yet. */
  pending = false
  /** Prefixes that would be there after a crash. */
  durable = 0
  private readonly store: KvStore
  private readonly cache: PrefixCache
  private readonly cold: ColdPrefixes
  private readonly regions: RegionTable
  private readonly transfers: Transfers
  private readonly byEnd = new Map<PrefixNode, Kept>()
  private readonly byPlace = new Map<number, Set<PrefixNode>>()

  constructor(
    store: KvStore,
    cache: PrefixCache,
    cold: ColdPrefixes,
    regions: RegionTable,
    transfers: Transfers,
  ) {
    this.store = store
    this.cache = cache
    this.cold = cold
    this.regions = regions
    this.transfers = transfers
    const { onFree } = transfers.places
    transfers.places.onFree = (place) => {
      this.placeFreed(place)
      onFree(place)
    }
    for (const { id, tenant, tokens, places } of store.entries()) {
      const end = cache.restore(tenant, tokens, places)
      const now = this.placesOf(end)
      const same = now?.length === places.length && places.every((place, i) => place === now[i])
      // Else another one had part of it elsewhere; it is remembered anew.
      if (same && !this.byEnd.has(end)) this.remember(end, { id, places, durable: true })
      else store.remove(id)
    }
  }

  /** Writes out what is in memory only, and remembers what is on disk in full. */
  keep(): void {
    this.pending = false
    for (const node of this.cache.nodes()) {
      if (node.coming) continue
      if (!node.places) {
        if (!this.cold.copy(node)) this.pending = true
      } else if (node.children.size === 0 && !this.byEnd.has(node)) this.put(node)
    }
  }

  /** What ends here would be there after a crash. */
  isDurable(end: PrefixNode): boolean {
    return this.byEnd.get(end)?.durable ?? false
  }

  /** Throws if what is remembered may be written over. */
  check(): void {
    for (const { places } of this.byEnd.values()) {
      const held = places.every((place) => this.transfers.places.isHeld(place))
      assert(held, 'what is remembered keeps its places')
    }
  }

  private put(end: PrefixNode): void {
    const places = this.placesOf(end)
    if (!places) return
    const tokens = new Int32Array(end.from + end.tokens.length)
    for (const node of pathTo(end)) tokens.set(node.tokens, node.from)
    const { tenant } = end
    const prefix = { parent: 0, tenant, from: 0, tokens, firstColumn: 0, places }
    const { id, ticket } = this.store.put(prefix)
    const kept = { id, places, durable: false }
    this.remember(end, kept)
    this.transfers.follow(ticket, (error) => {
      if (this.byEnd.get(end) !== kept) return
      if (error) return this.forget(end)
      kept.durable = true
      this.durable++
    })
  }

  /** By column from the first: where it is on disk; undefined if not all are. */
  private placesOf(end: PrefixNode): Uint32Array | undefined {
    const places = new Uint32Array(columnsOf(this.regions, end).end)
    for (const node of pathTo(end)) {
      if (!node.places) return undefined
      // Of a column that two have bytes of, the later one has all.
      places.set(node.places, columnsOf(this.regions, node).first)
    }
    return places
  }

  private remember(end: PrefixNode, kept: Kept): void {
    this.byEnd.set(end, kept)
    if (kept.durable) this.durable++
    for (const place of kept.places) {
      const ends = this.byPlace.get(place)
      if (ends) ends.add(end)
      else this.byPlace.set(place, new Set([end]))
    }
  }

  private forget(end: PrefixNode): void {
    const kept = this.byEnd.get(end)
    assert(kept, 'what is forgotten was kept')
    this.byEnd.delete(end)
    if (kept.durable) this.durable--
    for (const place of kept.places) {
      const ends = this.byPlace.get(place)
      ends?.delete(end)
      if (ends?.size === 0) this.byPlace.delete(place)
    }
    this.store.remove(kept.id)
  }

  private placeFreed(place: number): void {
    for (const end of this.byPlace.get(place) ?? []) this.forget(end)
  }
}

/** The nodes that lead to one, and itself. */
function pathTo(end: PrefixNode): PrefixNode[] {
  const path: PrefixNode[] = []
  for (let node = end; node.parent; node = node.parent) path.unshift(node)
  return path
}
