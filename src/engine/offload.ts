// Owns what an engine has outside of memory: the sequences that made room and the cached prefixes
// that were used least, what moving them costs, and how much was moved.

import { ColdPrefixes } from '../kv/cold.ts'
import type { KvHistory } from '../kv/history.ts'
import { KeptPrefixes } from '../kv/kept.ts'
import type { Level, Outside } from '../kv/outside.ts'
import type { PrefixCache } from '../kv/prefix.ts'
import type { PrefixNode } from '../kv/prefix-node.ts'
import type { KvColumns } from '../kv/regions.ts'
import type { SlotTable } from '../kv/slots.ts'
import type { KvStore } from '../kv/tier.ts'
import { Tiers } from '../kv/tiers.ts'
import type { Transfers } from '../kv/transfers.ts'
import type { Costs } from '../scheduler/costs.ts'
import type { Preemption } from '../scheduler/scheduler.ts'
import type { TierSnapshot } from './api.ts'

/** Fractions of the KV memory, and of what of it prefixes may keep. */
export interface Watermarks {
  /** Above it, cached prefixes go out of memory. */
  high: number
  /** Until no more than this is in use. */
  low: number
}

export const WATERMARKS_DEFAULT: Watermarks = { high: 0.9, low: 0.8 }

export interface OffloadOptions {
  watermarks?: Watermarks | undefined
  /** How sequences that made room come back; unless told, in the way that takes less time. */
  comeBack?: 'moved' | 'computed' | undefined
}

/** Share of the memory that goes out at a time when the machine has too little. */
const PRESSED_SHARE = 0.1

export class Offload implements Preemption {
  readonly tiers: Tiers
  readonly cold: ColdPrefixes | undefined
  private readonly kept: KeptPrefixes | undefined
  private readonly transfers: Transfers
  private readonly slots: SlotTable
  private readonly cache: PrefixCache | undefined
  private readonly costs: Costs
  private readonly options: OffloadOptions
  private readonly moved = { save: 0, load: 0 }

  constructor(
    transfers: Transfers,
    slots: SlotTable,
    cache: PrefixCache | undefined,
    costs: Costs,
    options: OffloadOptions,
    history: KvHistory,
    store?: KvStore,
  ) {
    this.transfers = transfers
    this.slots = slots
    this.cache = cache
    this.costs = costs
    this.options = options
    this.tiers = new Tiers(transfers, slots)
    this.cold = cache && new ColdPrefixes(cache, slots.regions, transfers)
    this.kept =
      store && cache && this.cold
        ? new KeptPrefixes(store, cache, this.cold, slots.regions, transfers)
        : undefined
    const { ranges, shape } = slots.layout
    transfers.onEnded = ({ kind, columns, below, ms, failed }) => {
      const bytes = columns * ranges * shape.pageBytes
      if (failed) return history.add('lost', bytes)
      history.add(kind === 'save' ? 'offload' : 'reload', bytes)
      this.moved[kind] += columns
      // What was moved teaches what moving costs.
      if (below > 0) costs.moved('fetch', below * ranges, ms)
      else costs.moved(kind, columns * ranges, ms)
    }
    transfers.onFaults = (count) => history.add('fault', count * shape.pageBytes, count)
  }

  get busy(): boolean {
    return this.transfers.busy
  }

  get leavingPages(): number {
    return this.tiers.leavingPages + (this.cold?.leavingPages ?? 0)
  }

  preferMoving(pages: number, promptTokens: number, outputTokens: number): boolean {
    const { comeBack } = this.options
    if (comeBack) return comeBack === 'moved'
    return this.costs.preferMoving(pages, promptTokens, outputTokens)
  }

  /**
   * Writes what shall outlive the process, if anything, as far as nobody uses it.
   * @returns false when that is done
   */
  flush(nowMs: number): boolean {
    if (!this.kept) return false
    while (this.slots.reclaim(Infinity) >= 0);
    this.transfers.poll(nowMs)
    this.kept.keep()
    return this.busy
  }

  /** Something cached waits to be written to the store. */
  get keeping(): boolean {
    return this.kept?.pending ?? false
  }

  /** Whether a cached prefix would be there after a crash; undefined without a store. */
  isDurable(end: PrefixNode): boolean | undefined {
    return this.kept?.isDurable(end)
  }

  /** Writes to the store what shall outlive the process. */
  keep(): void {
    this.kept?.keep()
  }

  /** Takes cached prefixes out of memory before somebody has to wait for it. */
  keepRoom(): void {
    const { high, low } = this.options.watermarks ?? WATERMARKS_DEFAULT
    const { usedPages, limitPages } = this.slots
    if (usedPages > high * limitPages) this.cold?.demote(low * limitPages)
    const { cachedPages } = this.slots.regions
    const cacheMost = this.cache?.budgetPages ?? Infinity
    if (cachedPages > high * cacheMost) this.cold?.demote(usedPages - cachedPages + low * cacheMost)
  }

  /** The machine has too little memory: some of what is only cached goes. */
  relieve(): void {
    const { usedPages, limitPages } = this.slots
    this.cold?.demote(usedPages - PRESSED_SHARE * limitPages)
  }

  /**
   * Begins to bring back what of a prompt is cached outside of memory.
   * @param always even if it is computed sooner
   * @returns whether it is on its way
   */
  fetch(tenant: string, tokens: Int32Array, length: number, always = false): boolean {
    const worth = (pages: number, count: number, below: number) =>
      always || this.costs.preferLoading(pages, count, below)
    const makeRoom = (pages: number) => this.makeRoom(pages)
    return this.cold?.fetch(tenant, tokens, length, worth, makeRoom) ?? false
  }

  /** Where a prefix lies that is outside of memory: on disk if a part of it does. */
  levelOf({ places }: PrefixNode): Level {
    return places?.every((at) => this.transfers.levelOf(at) === 'host') ? 'host' : 'disk'
  }

  /** For the map of what is where. */
  get outside(): Outside {
    const { images } = this.tiers
    const { places } = this.transfers
    const levelOf = (place: number): Level => this.transfers.levelOf(place)
    return { places, levelOf, images, moving: this.cold?.moving ?? new Map() }
  }

  /** What is held in memory besides by slots and the cache. */
  *holds(): Generator<KvColumns> {
    yield* this.tiers.holds()
    if (this.cold) yield* this.cold.holds()
  }

  /** Throws if places contradict those who hold them. */
  check(): void {
    const held = [...this.tiers.placesHeld(), ...(this.cold?.placesHeld() ?? [])]
    this.transfers.places.check(held)
    this.kept?.check()
  }

  /** @param imagesLost sequences that could not be moved after all */
  snapshot(offloads: number, imagesLost: number): TierSnapshot {
    const { layout } = this.slots
    const columnBytes = layout.ranges * layout.shape.pageBytes
    const { path, places, levels } = this.transfers
    const { capacity, used } = places
    return {
      ...(path !== undefined && { path }),
      ...(levels && { levels }),
      capacityBytes: capacity * columnBytes,
      usedBytes: used * columnBytes,
      savedBytes: this.moved.save * columnBytes,
      loadedBytes: this.moved.load * columnBytes,
      offloads,
      demotions: this.cache?.demotions ?? 0,
      fetches: this.cold?.fetches ?? 0,
      lost: imagesLost + (this.cold?.lost ?? 0),
      faults: this.transfers.faults,
      kept: this.kept?.durable ?? 0,
    }
  }

  private makeRoom(pages: number): boolean {
    const { slots, cache } = this
    if (slots.availablePages() < pages) return false
    while (slots.usedPages + pages > slots.limitPages) {
      if (slots.reclaim(Infinity) < 0 && !cache?.evict()) return false
    }
    return true
  }
}
