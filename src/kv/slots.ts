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
//
// A fork takes no page: the column that it shares in part is copied when it first grows, and until
// then counts as promised, so that nobody else is let in for it.

import { assert, present } from '../assert.ts'
import { type KvLayout, pagesFor } from './layout.ts'
import {
  clipSpans,
  columnsFor,
  copiedColumns,
  type KvColumns,
  type KvSpan,
  mergeSpans,
  type RegionTable,
  shareableColumns,
  sharedColumns,
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
  /** Columns of other regions that it holds. */
  held: readonly KvColumns[]
  /** Columns of its own region that it holds. */
  first: number
  end: number
  /** Tokens of these spans lie in `first` and after, to be copied when it first grows. */
  pending: readonly KvSpan[] | undefined
  /** Columns that it will need for its next token, while it is pending. */
  promised: number
  /** It holds only columns that it maps, and forks at its full length only. */
  beam: boolean
}

/** A slot that is not free, and all that it holds. */
export interface SlotInUse extends Pick<Slot, 'state' | 'region' | 'first' | 'end' | 'held'> {
  slot: number
  /** Since when it is warm, as `retire` took it. */
  sinceMs: number
  /** The tokens that lie in `held`. */
  spans: readonly KvSpan[]
  /** Its own first columns have nothing of these tokens yet. */
  pending: boolean
}

/** How a slot shows what it holds. */
export interface ShownSlot {
  /** Where it writes. */
  region: number
  /** Where its tokens lie. */
  spans: readonly KvSpan[]
  pending: boolean
  beam: boolean
}

/** What a slot holds while it is free. */
const NOTHING = {
  shared: [],
  held: [],
  first: 0,
  end: 0,
  pending: undefined,
  promised: 0,
  beam: false,
} satisfies Partial<Slot>

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
  private promised = 0
  /** Forks of beams that were copied in part, because they lay in too many regions. */
  compactions = 0

  constructor(regions: RegionTable, slots: number) {
    this.layout = regions.layout
    this.regions = regions
    this.slots = Array.from({ length: slots }, (_, slot) => ({
      state: 'free',
      region: slot,
      ...NOTHING,
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

  *inUse(): Generator<SlotInUse> {
    const since = new Map(this.warm.map(({ slot, sinceMs }) => [slot, sinceMs]))
    for (const [
      slot,
      { state, region, first, end, held, shared, pending },
    ] of this.slots.entries()) {
      if (state === 'free') continue
      const spans = pending ?? shared
      const holds = { region, first, end, held, spans, pending: pending !== undefined }
      yield { slot, state, sinceMs: since.get(slot) ?? -Infinity, ...holds }
    }
  }

  /** Pages of a slot's own, shared ones of its prefix not included. */
  pagesOf(slot: number): number {
    const { first, end } = this.slot(slot)
    return (end - first) * this.layout.ranges
  }

  /** Pages that a held slot lacks to hold `tokens` tokens. */
  missingPages(slot: number, tokens: number): number {
    const more = columnsFor(this.layout, tokens) - this.slot(slot).end
    return Math.max(0, more) * this.layout.ranges
  }

  /** All that a slot holds. */
  columnsHeld(slot: number): KvColumns[] {
    const { region, first, end, held } = this.slot(slot)
    return [...held, { region, first, end }]
  }

  /** Where a slot's first `tokens` tokens lie, without gaps from column 0 on. */
  columnsShown(slot: number, tokens: number): KvColumns[] {
    const { region, first, shared, pending } = this.slot(slot)
    if (pending) return copiedColumns(this.layout, pending, 0)
    const own = { region, first, end: columnsFor(this.layout, tokens) }
    const all = [...sharedColumns(this.layout, shared), own]
    return all.filter(({ first, end }) => end > first)
  }

  shownBy(slot: number, tokens: number): ShownSlot {
    const { region, pending, beam } = this.slot(slot)
    const spans = pending ?? this.spansOf(slot, tokens)
    return { region, spans, pending: pending !== undefined, beam }
  }

  get freeSlots(): number {
    return this.slots.reduce((count, { state }) => count + (state === 'free' ? 1 : 0), 0)
  }

  /**
   * Takes a free slot that shows tokens as another one did, the last of them in its own region.
   * They are about to be filled in: the region was taken, and grown, already.
   */
  acquireShown({ region, spans: all, pending, beam }: ShownSlot): number {
    const { layout, regions } = this
    const slot = this.slots.findIndex(({ state }) => state === 'free')
    const spans = pending ? all : all.slice(0, -1)
    regions.mover.map(slot, region, spans)
    const taken = this.slot(slot)
    Object.assign(taken, { state: 'held', region, beam })
    if (pending) taken.held = copiedColumns(layout, spans, 0)
    else taken.held = beam ? sharedColumns(layout, spans) : spannedColumns(layout, spans)
    for (const columns of taken.held) regions.hold(columns, 'live')
    this.share(taken, spans, spans)
    if (pending) return slot
    taken.pending = undefined
    this.promise(taken, 0)
    taken.end = Math.max(taken.first, columnsFor(layout, spannedTokens(all)))
    regions.hold({ region, first: taken.first, end: taken.end }, 'live')
    return slot
  }

  /** Part of what it holds is in another's region still, until it grows. */
  isPending(slot: number): boolean {
    return this.slot(slot).pending !== undefined
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
    return this.pagesBeside(tokens, shared) <= this.availableBeside(shared)
  }

  /** Pages that a slot of `tokens` tokens has of its own if it begins with `shared`. */
  pagesBeside(tokens: number, shared: readonly KvSpan[]): number {
    const shareable = shareableColumns(this.layout, spannedTokens(shared)) * this.layout.ranges
    return pagesFor(this.layout, tokens) - shareable
  }

  /** Pages that could be had now by whoever keeps `shared`. */
  availableBeside(shared: readonly KvSpan[]): number {
    const columns = spannedColumns(this.layout, shared)
    return this.availablePages() - this.regions.evictableIn(columns)
  }

  /**
   * Pages that could be had now, counting those of warm slots and of prefixes only cached, without
   * those that forks are about to take.
   */
  availablePages(): number {
    const { limitPages, usedPages, warmPages, regions, layout } = this
    return (
      limitPages - usedPages - this.promised * layout.ranges + warmPages + regions.evictablePages
    )
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
   * the slot. No page is taken before it grows.
   * @returns -1, with nothing changed, if no slot or region is free
   */
  acquireShared(shared: readonly KvSpan[]): number {
    const slot = this.acquireFree(shared)
    if (slot < 0) return -1
    const taken = this.slot(slot)
    taken.held = spannedColumns(this.layout, shared)
    this.share(taken, shared, shared)
    return slot
  }

  /**
   * Lets a slot go on from all `tokens` tokens of another one, as beams do at every token. It holds
   * what it maps and no more, so it can be forked at its full length only.
   * @param slot a beam's that was given up and is held still; -1 takes a free one
   * @param spansMax other regions that its tokens may lie in; beyond it the later ones are copied
   * @returns the slot, or -1, with nothing changed, if no slot or region is free
   */
  forkBeam(slot: number, parent: number, tokens: number, spansMax: number): number {
    const spans = mergeSpans(this.layout, this.spansOf(parent, tokens))
    const tooLong = spans.length > spansMax
    const shared = tooLong ? spans.slice(0, beamSpansKept(spansMax)) : spans
    const held = copiedColumns(this.layout, spans, 0)
    for (const columns of held) this.regions.hold(columns, 'live')
    const index = slot < 0 ? this.acquireFree(shared) : this.giveUp(slot, shared, tokens)
    if (index < 0) {
      for (const columns of held) this.regions.drop(columns, 'live')
      return -1
    }
    const taken = this.slot(index)
    taken.beam = true
    taken.held = held
    this.share(taken, shared, spans)
    if (tooLong) this.compactions++
    return index
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
    const more = Math.max(0, end - held.end)
    if (more > 0) {
      if (this.usedPages + more * this.layout.ranges > this.limitPages) return false
      this.regions.hold({ region: held.region, first: held.end, end }, 'live')
      this.regions.mover.grow?.(held.region, held.end, end)
      held.end = end
    }
    if (held.pending) this.copyPending(slot, held.pending)
    return true
  }

  /** A held slot is likely to hold `tokens` tokens soon; nothing is accounted for yet. */
  expect(slot: number, tokens: number): void {
    if (!this.regions.mover.expect) return
    const { state, region, end } = this.slot(slot)
    assert(state === 'held', 'only a held slot is expected to grow')
    const soon = columnsFor(this.layout, tokens)
    if (soon > end) this.regions.mover.expect(region, end, soon)
  }

  /**
   * The sequence has ended: its slot turns warm, or free if others use its pages or it others'.
   * @param sinceMs now, -Infinity if no successor is in sight: then it is reclaimed first; or
   *   'gone' if some of its pages are not there: then it is free at once
   */
  retire(slot: number, sinceMs: number | 'gone'): void {
    const held = this.slot(slot)
    assert(held.state === 'held', 'only a held slot retires')
    const { region, first, end, shared } = held
    if (sinceMs === 'gone' || shared.length > 0 || this.regions.holds(region) > end - first) {
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

  /** What the slots hold: each its own columns, and every column of what it shares. */
  *holds(): Generator<KvColumns> {
    for (const { state, region, first, end, held } of this.slots) {
      if (state === 'free') continue
      yield { region, first, end }
      yield* held
    }
  }

  /** Throws if the counts contradict each other. */
  check(): void {
    this.regions.check()
    const regions = new Set<number>()
    this.slots.forEach(({ state, region, first, end, shared }, slot) => {
      if (state === 'free') return assert(first === end, `free slot ${slot} holds no pages`)
      assert(!regions.has(region), `region ${region} has one writer`)
      regions.add(region)
      const from = shareableColumns(this.layout, spannedTokens(shared))
      assert(first === from && end >= first, `slot ${slot} writes after what it shares`)
    })
    const promised = this.slots.reduce((sum, slot) => sum + slot.promised, 0)
    assert(promised === this.promised, 'promised columns are the sum over slots')
    for (const { slot } of this.warm) {
      const { state, region, first, end } = this.slot(slot)
      assert(state === 'warm', `slot ${slot} is warm`)
      assert(this.regions.holds(region) === end - first, `warm slot ${slot} is nobody else's`)
    }
  }

  private acquireFree(shared: readonly KvSpan[] = []): number {
    const slot = this.slots.findIndex(({ state }) => state === 'free')
    if (slot < 0) return -1
    const free = this.slot(slot)
    const region = this.regions.take(free.region)
    if (region < 0) return -1
    if (region !== free.region || shared.length > 0) this.regions.mover.map(slot, region, shared)
    free.region = region
    free.state = 'held'
    return slot
  }

  /**
   * Takes everything from a held slot but what it will write to as a fork of `tokens` tokens, and
   * maps `shared` into it. -1, with nothing changed, if that needs another region and none is free.
   */
  private giveUp(index: number, shared: readonly KvSpan[], tokens: number): number {
    const slot = this.slot(index)
    const from = shareableColumns(this.layout, spannedTokens(shared))
    const { region } = slot
    const own = { region, first: slot.first, end: slot.end }
    if (this.regions.isHeldFrom(own, this.regions.mover.inPlace ? 0 : from)) {
      const other = this.regions.take(-1)
      if (other < 0) return -1
      this.regions.leave(region)
      this.regions.drop(own, 'live')
      if (slot.shared.length > 0) this.regions.mover.unshare?.(region)
      slot.region = other
      slot.end = 0
    } else {
      const end = Math.max(slot.first, Math.min(slot.end, columnsFor(this.layout, tokens)))
      const first = slot.first <= from && from < end ? from : end
      this.regions.drop({ region, first: slot.first, end: first }, 'live')
      this.regions.drop({ region, first: end, end: slot.end }, 'live')
      slot.end = first < end ? end : 0
    }
    for (const columns of slot.held) this.regions.drop(columns, 'live')
    this.regions.mover.map(index, slot.region, shared)
    return index
  }

  /** Notes what a slot begins with: the tokens of `spans`, as far as `shared` goes by mapping. */
  private share(slot: Slot, shared: readonly KvSpan[], spans: readonly KvSpan[]): void {
    slot.shared = shared
    slot.first = shareableColumns(this.layout, spannedTokens(shared))
    slot.end = Math.max(slot.first, slot.end)
    slot.pending = spans
    const needed = columnsFor(this.layout, spannedTokens(spans) + 1)
    this.promise(slot, Math.max(0, needed - slot.end))
  }

  private copyPending(index: number, spans: readonly KvSpan[]): void {
    const slot = this.slot(index)
    if (columnsFor(this.layout, spannedTokens(spans)) > slot.first) {
      this.regions.mover.copy(index, slot.first, spans)
    }
    slot.pending = undefined
    this.promise(slot, 0)
    if (!slot.beam) return
    const { held } = slot
    slot.held = sharedColumns(this.layout, slot.shared)
    for (const columns of slot.held) this.regions.hold(columns, 'live')
    for (const columns of held) this.regions.drop(columns, 'live')
  }

  private promise(slot: Slot, columns: number): void {
    this.promised += columns - slot.promised
    slot.promised = columns
  }

  private free(index: number): void {
    const slot = this.slot(index)
    const { region, first, end, shared, held } = slot
    const own: KvColumns = { region, first, end }
    this.promise(slot, 0)
    this.regions.leave(region)
    this.regions.drop(own, 'live')
    for (const columns of held) this.regions.drop(columns, 'live')
    // With another's pages mapped into it, it is mapped anew for its next sequence.
    if (shared.length > 0) this.regions.mover.unshare?.(region)
    Object.assign(slot, NOTHING, { state: 'free', region: shared.length > 0 ? -1 : region })
  }

  private slot(slot: number): Slot {
    return present(this.slots[slot], 'a slot')
  }
}

/** Of the regions that a beam's tokens may lie in, those that stay when it lies in too many. */
export function beamSpansKept(spansMax: number): number {
  return Math.max(1, spansMax >> 1)
}
