// Owns who holds which slot, and which region's pages lie beneath it: the account that keeps KV
// memory under its limit before a page is touched. A backend moves the memory as it is told.
//
//   free ──acquire──▶ held ──retire──▶ warm ──reclaim──▶ free
//                      ▲                 │
//                      └─────acquire─────┘   (its pages are reused in place)
//
// A warm slot keeps the pages of the sequence that ended, for one that will soon overwrite them:
// faulting a page in costs more than writing to it. They count as used until reclaimed. A slot
// whose pages are also another's cannot be overwritten: it becomes free as it retires.

import { assert, present } from '../assert.ts'
import { type KvLayout, pagesFor } from './layout.ts'
import {
  clipSpans,
  columnsFor,
  fullColumns,
  type KvColumns,
  type KvSpan,
  type RegionTable,
  spannedColumns,
  spannedTokens,
} from './regions.ts'

type State = 'free' | 'held' | 'warm'

interface Slot {
  state: State
  /** Where it writes; while free, what is still mapped there. -1: nothing that may be used. */
  region: number
  /** Tokens that lie in other regions, or were copied from there into the boundary column. */
  shared: readonly KvSpan[]
  /** Columns of its own region that it holds. */
  first: number
  end: number
}

interface WarmSlot {
  slot: number
  sinceMs: number
}

export class SlotTable {
  readonly layout: KvLayout
  readonly regions: RegionTable
  private readonly slots: Slot[]
  /** Longest warm first. */
  private readonly warm: WarmSlot[] = []

  constructor(regions: RegionTable, slots: number) {
    this.layout = regions.layout
    this.regions = regions
    this.slots = Array.from({ length: slots }, (_, slot) => ({
      state: 'free',
      region: slot,
      shared: [],
      first: 0,
      end: 0,
    }))
  }

  get limitPages(): number {
    return this.regions.limitPages
  }

  /** Pages of held slots, warm slots and cached prefixes together, each counted once. */
  get usedPages(): number {
    return this.regions.usedPages
  }

  /** When the longest-warm slot turned warm; undefined if none is. */
  get warmSinceMs(): number | undefined {
    return this.warm[0]?.sinceMs
  }

  get warmPages(): number {
    return this.warm.reduce((sum, { slot }) => sum + this.pagesOf(slot), 0)
  }

  /** Slots that are not free; `sinceMs` of those that are warm, as `retire` took it. */
  *inUse(): Generator<
    Pick<Slot, 'region' | 'first' | 'end' | 'shared'> & { slot: number; sinceMs: number }
  > {
    const since = new Map(this.warm.map(({ slot, sinceMs }) => [slot, sinceMs]))
    for (const [slot, { state, region, first, end, shared }] of this.slots.entries()) {
      if (state === 'free') continue
      yield { slot, sinceMs: since.get(slot) ?? -Infinity, region, first, end, shared }
    }
  }

  /** Pages of a slot's own, shared ones of its prefix not included. */
  pagesOf(slot: number): number {
    const { first, end } = this.slot(slot)
    return (end - first) * this.layout.ranges
  }

  /** Where the first `tokens` tokens of a held slot lie. */
  spansOf(slot: number, tokens: number): KvSpan[] {
    const { region, shared } = this.slot(slot)
    const own = { region, from: spannedTokens(shared), to: tokens }
    return clipSpans([...shared, own], tokens)
  }

  /**
   * Whether `tokens` tokens could be had now, the first ones shared, if every warm slot and every
   * cached prefix but these made room.
   */
  fits(tokens: number, shared: readonly KvSpan[] = []): boolean {
    const columns = spannedColumns(this.layout, shared)
    const shareable = fullColumns(this.layout, spannedTokens(shared)) * this.layout.ranges
    const available = this.availablePages() - this.regions.evictableIn(columns)
    return pagesFor(this.layout, tokens) - shareable <= available
  }

  /** Pages that could be had now, counting those of warm slots and of prefixes only cached. */
  availablePages(): number {
    return this.limitPages - this.usedPages + this.warmPages + this.regions.evictablePages
  }

  /**
   * Takes a slot for a sequence that is about to hold `tokens` tokens: a warm one whose pages those
   * tokens will all overwrite, else the lowest free one. -1 if every slot is held or too large, or
   * no region is free.
   */
  acquire(tokens: number): number {
    const needed = pagesFor(this.layout, tokens)
    const reusable = this.warm.findIndex(({ slot }) => this.pagesOf(slot) <= needed)
    if (reusable < 0) return this.acquireFree()
    const { slot } = present(this.warm.splice(reusable, 1)[0], 'a warm slot')
    this.slot(slot).state = 'held'
    return slot
  }

  /**
   * Takes a free slot that begins with the tokens of `shared`, which are pinned: the pin passes to
   * the slot. The column after the whole ones is copied, so it must be within the limit.
   * @returns -1, with nothing changed, if it is not, or no slot or region is free
   */
  acquireShared(shared: readonly KvSpan[]): number {
    const tokens = spannedTokens(shared)
    const first = fullColumns(this.layout, tokens)
    const boundary = columnsFor(this.layout, tokens) - first
    if (this.usedPages + boundary * this.layout.ranges > this.limitPages) return -1
    const slot = this.acquireFree()
    if (slot < 0) return -1
    const taken = this.slot(slot)
    taken.shared = shared
    taken.first = first
    taken.end = first
    this.extend(taken, first + boundary)
    this.regions.mover.map(slot, taken.region, shared)
    return slot
  }

  /** Keeps the pages of a prefix from going while room is made for its new user. */
  pin(shared: readonly KvSpan[]): void {
    for (const columns of spannedColumns(this.layout, shared)) this.regions.hold(columns, 'live')
  }

  unpin(shared: readonly KvSpan[]): void {
    for (const columns of spannedColumns(this.layout, shared)) this.regions.drop(columns, 'live')
  }

  /**
   * Accounts for the pages that a held slot needs to hold `tokens` tokens.
   * @returns false, with nothing changed, if that would exceed the limit.
   */
  grow(slot: number, tokens: number): boolean {
    const held = this.slot(slot)
    assert(held.state === 'held', 'only a held slot grows')
    const end = columnsFor(this.layout, tokens)
    if (end <= held.end) return true
    if (this.usedPages + (end - held.end) * this.layout.ranges > this.limitPages) return false
    this.extend(held, end)
    return true
  }

  /**
   * The sequence has ended: its slot turns warm, or free if others use its pages or it others'.
   * @param sinceMs now, or -Infinity if no successor is in sight: then it is reclaimed first
   */
  retire(slot: number, sinceMs: number): void {
    const held = this.slot(slot)
    assert(held.state === 'held', 'only a held slot retires')
    if (held.shared.length > 0 || this.regions.holds(held.region) > held.end - held.first) {
      this.free(slot)
      return
    }
    held.state = 'warm'
    let at = this.warm.length
    while (at > 0 && present(this.warm[at - 1], 'a warm slot').sinceMs > sinceMs) at--
    this.warm.splice(at, 0, { slot, sinceMs })
  }

  /**
   * Gives back the pages of the longest-warm slot that turned warm at or before `untilMs`.
   * @returns the slot, now free, or -1 if there is none
   */
  reclaim(untilMs: number): number {
    const longest = this.warm[0]
    if (!longest || longest.sinceMs > untilMs) return -1
    this.warm.shift()
    this.free(longest.slot)
    return longest.slot
  }

  /** Throws if the counts contradict each other. */
  check(): void {
    this.regions.check()
    const regions = new Set<number>()
    this.slots.forEach(({ state, region, first, end, shared }, slot) => {
      if (state === 'free') return assert(first === end, `free slot ${slot} holds no pages`)
      assert(!regions.has(region), `region ${region} has one writer`)
      regions.add(region)
      const from = fullColumns(this.layout, spannedTokens(shared))
      assert(first === from && end >= first, `slot ${slot} writes after what it shares`)
    })
    for (const { slot } of this.warm) {
      const { state, region, first, end } = this.slot(slot)
      assert(state === 'warm', `slot ${slot} is warm`)
      assert(this.regions.holds(region) === end - first, `warm slot ${slot} is nobody else's`)
    }
  }

  private acquireFree(): number {
    const slot = this.slots.findIndex(({ state }) => state === 'free')
    if (slot < 0) return -1
    const free = this.slot(slot)
    const region = this.regions.take(free.region)
    if (region < 0) return -1
    if (region !== free.region) this.regions.mover.map(slot, region, [])
    free.region = region
    free.state = 'held'
    return slot
  }

  private extend(slot: Slot, end: number): void {
    this.regions.hold({ region: slot.region, first: slot.end, end }, 'live')
    slot.end = end
  }

  private free(index: number): void {
    const slot = this.slot(index)
    const { region, first, end, shared } = slot
    const own: KvColumns = { region, first, end }
    this.regions.leave(region)
    this.regions.drop(own, 'live')
    this.unpin(shared)
    slot.state = 'free'
    slot.first = 0
    slot.end = 0
    // With another's pages mapped into it, it is mapped anew for its next sequence.
    if (shared.length > 0) slot.region = -1
    slot.shared = []
  }

  private slot(slot: number): Slot {
    return present(this.slots[slot], 'a slot')
  }
}
