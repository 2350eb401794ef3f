// Owns which cached prefixes outlive the process: each is written out as soon as nobody writes to
// its memory any more, what leads to it before it, and is there again, outside of memory, at the
// start.

import type { ColdPrefixes } from './cold.ts'
import { columnsOf } from './eviction-queue.ts'
import type { PrefixCache, PrefixNode } from './prefix.ts'
import { fullColumns, type RegionTable } from './regions.ts'
import type { KvStore } from './tier.ts'
import type { Transfers } from './transfers.ts'

/** Writes under way at a time: those that make room for a sequence shall not wait behind many. */
const WRITES_MAX = 4

export class KeptPrefixes {
  private readonly cache: PrefixCache
  private readonly cold: ColdPrefixes
  private readonly regions: RegionTable
  private readonly transfers: Transfers
  private readonly store: KvStore
  private readonly writing = new Set<PrefixNode>()

  constructor(
    cache: PrefixCache,
    cold: ColdPrefixes,
    regions: RegionTable,
    transfers: Transfers,
    store: KvStore,
  ) {
    this.cache = cache
    this.cold = cold
    this.regions = regions
    this.transfers = transfers
    this.store = store
    cache.onUnkeep = (id) => store.remove(id)
    this.restore()
  }

  /**
   * Begins to keep what is not kept yet.
   * @returns whether some has to wait because a sequence may still write to its memory
   */
  keep(): boolean {
    let waits = false
    for (const node of this.cache.nodes()) {
      if (node.kept > 0 || node.coming || this.writing.has(node) || !this.mayFollow(node)) continue
      if (node.places) this.put(node, node.places)
      else if (this.mayChange(node)) waits = true
      else if (this.writing.size < WRITES_MAX) this.write(node)
      else return true
    }
    return waits
  }

  /** Takes in what an earlier process kept; what does not fit falls with all that follows. */
  private restore(): void {
    const nodes = new Map<number, PrefixNode>()
    for (const { id, parent, tenant, from, tokens, firstColumn, places } of this.store.entries()) {
      const above = nodes.get(parent)
      const fits = firstColumn === fullColumns(this.regions.layout, from)
      const node =
        fits && (parent === 0 || above)
          ? this.cache.addCold(tenant, above, tokens, places.slice())
          : undefined
      if (node) {
        node.kept = id
        nodes.set(id, node)
        for (const place of places) this.transfers.places.share(place)
      } else if (parent === 0 || above) this.store.remove(id)
    }
  }

  private mayFollow({ parent }: PrefixNode): boolean {
    return parent !== undefined && (parent.kept > 0 || parent.parent === undefined)
  }

  /** Whether a sequence may write to what it has: only its last column can be unfinished. */
  private mayChange(node: PrefixNode): boolean {
    const { region, first, end } = columnsOf(this.regions, node)
    const whole = fullColumns(this.regions.layout, node.from + node.tokens.length)
    if (whole === end || !this.regions.isOwned(region)) return false
    const last = { region, first: Math.max(first, end - 1), end }
    return this.regions.evictableIn([last]) < this.regions.layout.ranges
  }

  private write(node: PrefixNode): void {
    const began = this.cold.copy(node, (written) => {
      this.writing.delete(node)
      if (written && node.places && this.mayFollow(node)) this.put(node, node.places)
    })
    if (began) this.writing.add(node)
  }

  private put(node: PrefixNode, places: Uint32Array): void {
    const { parent, tenant, from, tokens } = node
    const firstColumn = columnsOf(this.regions, node).first
    const prefix = { parent: parent?.kept ?? 0, tenant, from, tokens, firstColumn, places }
    const { id, ticket } = this.store.put(prefix)
    node.kept = id
    this.transfers.await(ticket, () => {})
  }
}
