// Owns the way of cached prefixes out of memory and back. What was used least is written out before
// memory runs short, and read when a prompt begins with it; the tree (prefix.ts) knows which is
// where. A prefix that came back keeps its places: it goes again without being written.

import { columnsOf } from './eviction-queue.ts'
import type { Outlet, PrefixCache } from './prefix.ts'
import type { PrefixNode } from './prefix-node.ts'
import { type KvColumns, pagesOf, type RegionTable } from './regions.ts'
import type { Transfers } from './transfers.ts'

export class ColdPrefixes implements Outlet {
  /** Prefixes that could not be written or read back. */
  lost = 0
  /** Prefixes that came back because a prompt began with them. */
  fetches = 0
  private readonly cache: PrefixCache
  private readonly regions: RegionTable
  private readonly transfers: Transfers
  /** In memory until their transfer ends; and the places that no node has yet. */
  readonly moving = new Map<KvColumns, Uint32Array | undefined>()
  /** Written out, to stay in memory. */
  private readonly copying = new Set<PrefixNode>()
  /** By region: what is being read there. Undone is what stays outside all the same. */
  private readonly coming = new Map<number, { undone: boolean }>()
  /** Columns that become free, or may, when they have been written. */
  private leavingColumns = 0

  constructor(cache: PrefixCache, regions: RegionTable, transfers: Transfers) {
    this.cache = cache
    this.regions = regions
    this.transfers = transfers
    transfers.places.makeRoom = (count, copies) => this.freePlaces(count, copies)
    cache.outlet = this
  }

  get leavingPages(): number {
    return this.leavingColumns * this.regions.layout.ranges
  }

  /** Takes prefixes out of memory, those worth least first, until so few pages are used. */
  demote(usedPages: number): void {
    while (this.regions.usedPages - this.leavingPages > usedPages) {
      const node = this.cache.coldest
      if (!node) return
      if (node.places) this.cache.demote(node)
      else if (!this.save(node)) return
    }
  }

  drain(pages: number): boolean {
    this.demote(this.regions.usedPages - pages)
    return this.leavingColumns > 0
  }

  /**
   * Takes a prefix's end out of memory, whatever it is worth, and what leads to nothing else.
   * @returns false, with nothing changed, if a sequence uses it, or there is no room outside
   */
  demoteFrom(end: PrefixNode): boolean {
    for (let node = end; node.parent; node = node.parent) {
      if (node !== end && node.children.size > 1) return true
      if (node.region < 0) continue
      if (node.warm > 0 || node.coming || node.pins > 0) return node !== end
      // The rest follows when it has been written.
      if (!node.places) return this.save(node, () => this.demoteFrom(end)) || node !== end
      this.cache.demote(node)
    }
    return true
  }

  /**
   * Begins to bring back what of the first `length` tokens is cached outside of memory.
   * @param worth whether so many pages, some of them from below, are read sooner than so many
   *   tokens are computed
   * @param makeRoom lets go of memory until so many pages are free, if it can
   * @returns whether it is on its way
   */
  fetch(
    tenant: string,
    prompt: Int32Array,
    length: number,
    worth: (pages: number, tokens: number, below: number) => boolean,
    makeRoom: (pages: number) => boolean,
  ): boolean {
    const nodes = this.cache.cold(tenant, prompt, length)
    if (nodes === 'coming') return true
    const [top] = nodes
    const bottom = nodes.at(-1)
    if (!top?.parent || !bottom) return false
    const first = columnsOf(this.regions, top).first
    const { end } = columnsOf(this.regions, bottom)
    const pages = (end - first) * this.regions.layout.ranges
    const below = nodes.reduce((sum, { places }) => {
      return sum + (places ? this.transfers.below(places) : 0)
    }, 0)
    const tokens = bottom.from + bottom.tokens.length - top.from
    if (!worth(pages, tokens, below * this.regions.layout.ranges)) return false
    const { parent } = top
    // What leads to it stays: it would be read in vain.
    const path = this.pathOf(parent)
    for (const columns of path) this.begin(columns, undefined)
    this.cache.hold(parent)
    const region = this.cache.keepBudget(pages) && makeRoom(pages) ? this.regions.take(-1) : -1
    // Making room may have forgotten what was to come back.
    if (region < 0 || nodes.some(({ gone }) => gone)) {
      if (region >= 0) this.regions.leave(region)
      this.cache.letGo(parent)
      for (const columns of path) this.end(columns)
      return false
    }
    this.load({ region, first, end }, nodes, path)
    this.cache.letGo(parent)
    return true
  }

  /**
   * There is no memory in a region for what comes there: it stays outside, as if it was not asked
   * for, once what is under way has ended.
   */
  undo(region: number): void {
    const coming = this.coming.get(region)
    if (coming) coming.undone = true
  }

  /** What is kept in memory for transfers alone. */
  holds(): Iterable<KvColumns> {
    return this.moving.keys()
  }

  *placesHeld(): Generator<Uint32Array> {
    for (const places of this.moving.values()) if (places) yield places
    for (const { places } of this.cache.nodes()) if (places) yield places
  }

  /**
   * Begins to write out a prefix that stays in memory, unless that is under way or there is no
   * room: one copy does not make way for another, or they would for ever.
   * @returns false, with nothing changed, if a sequence may write to it
   */
  copy(node: PrefixNode): boolean {
    if (this.copying.has(node)) return true
    if (this.regions.isWritten(node.region)) return false
    if (this.write(node, false, () => void this.copying.delete(node))) this.copying.add(node)
    return true
  }

  private save(node: PrefixNode, then: () => void = () => {}): boolean {
    const columns = columnsOf(this.regions, node)
    const pages = pagesOf(this.regions.layout, columns)
    // What a sequence has part of may be written to, and would not be free.
    if (this.regions.evictableIn([columns]) < pages) return false
    const count = columns.end - columns.first
    const begun = this.write(node, true, (outcome) => {
      this.leavingColumns -= count
      const unused = outcome !== 'changed' && this.regions.evictableIn([columns]) === pages
      if (unused && node.warm === 0 && node.pins === 0) {
        // Somebody may wait for its memory: where nothing can be written, it is forgotten.
        if (outcome === 'failed') this.cache.forgetAll(node)
        else {
          this.cache.demote(node)
          then()
        }
      }
      this.cache.keepBudget()
    })
    if (begun) this.leavingColumns += count
    return begun
  }

  /** @param then told whether the node now has places, or is not what it was */
  private write(
    node: PrefixNode,
    overCopies: boolean,
    then: (outcome: 'written' | 'failed' | 'changed') => void,
  ): boolean {
    const columns = columnsOf(this.regions, node)
    const places = this.transfers.places.take(columns.end - columns.first, overCopies)
    if (!places) return false
    if (node.gone || node.places) {
      this.transfers.places.give(places)
      return false
    }
    this.begin(columns, places)
    this.transfers.begin('save', columns, places, (error) => {
      this.end(columns)
      if (error) this.lost++
      const now = columnsOf(this.regions, node)
      const same = now.region === columns.region && now.first === columns.first
      const changed = node.gone || node.places || !same || now.end !== columns.end
      if (error || changed) this.transfers.places.give(places)
      else node.places = places
      then(changed ? 'changed' : error ? 'failed' : 'written')
    })
    return true
  }

  private load(columns: KvColumns, nodes: readonly PrefixNode[], path: readonly KvColumns[]): void {
    const places = new Uint32Array(columns.end - columns.first)
    for (const node of nodes) {
      // Of a column that two have bytes of, the later one has all.
      places.set(node.places ?? [], columnsOf(this.regions, node).first - columns.first)
      this.cache.warmUp(node, columns.region, true)
    }
    this.begin(columns, undefined)
    this.regions.mover.grow?.(columns.region, columns.first, columns.end)
    this.regions.leave(columns.region)
    const coming = { undone: false }
    this.coming.set(columns.region, coming)
    this.transfers.begin('load', columns, places, (error) => {
      this.coming.delete(columns.region)
      if (error) {
        for (const node of nodes) this.cache.arrived(node)
        this.lost++
        const [top] = nodes
        if (top && !top.gone) this.cache.forgetAll(top)
      } else if (coming.undone) {
        for (const node of nodes.toReversed()) this.cache.coolDown(node)
      } else {
        for (const node of nodes) this.cache.arrived(node)
        this.fetches++
      }
      for (const held of [columns, ...path]) this.end(held)
      this.cache.keepBudget()
    })
  }

  /** What a node and those that lead to it have in memory. */
  private pathOf(node: PrefixNode): KvColumns[] {
    const path: KvColumns[] = []
    for (let at: PrefixNode | undefined = node; at?.parent; at = at.parent) {
      path.push(columnsOf(this.regions, at))
    }
    return path
  }

  private begin(columns: KvColumns, places: Uint32Array | undefined): void {
    this.regions.hold(columns, 'live')
    this.moving.set(columns, places)
  }

  private end(columns: KvColumns): void {
    this.moving.delete(columns)
    this.regions.drop(columns, 'live')
  }

  /** Gives up copies of what is in memory, then what was used longest ago. */
  private freePlaces(count: number, copies: boolean): void {
    const { places } = this.transfers
    const enough = places.used - count
    for (const node of this.cache.nodes()) {
      if (places.used <= enough || !copies) break
      if (node.region < 0 || node.coming || !node.places) continue
      places.give(node.places)
      node.places = undefined
    }
    const isEnd = ({ region, children }: PrefixNode) => region < 0 && children.size === 0
    for (let found = true; found && places.used > enough;) {
      const ends = [...this.cache.nodes()].filter(isEnd).toSorted((a, b) => a.usedAt - b.usedAt)
      found = ends.length > 0
      for (const end of ends) if (places.used > enough) this.cache.forgetAll(end)
    }
  }
}
