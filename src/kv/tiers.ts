// Owns what sequences have outside of memory: which place of the tier holds which column, and what
// is on its way out or back. It decides nothing about who goes: the scheduler does.
//
//   slot ──out──▶ leaving ──saved──▶ out ──back──▶ coming ──loaded──▶ slot
//                    ▲                                │
//                    └────────────stop────────────────┘   (its places still hold it)

import { assert } from '../assert.ts'
import { type KvLayout, tokenAlignedColumn } from './layout.ts'
import {
  clipSpans,
  columnsFor,
  fullColumns,
  type KvColumns,
  type KvSpan,
  spannedColumns,
} from './regions.ts'
import type { SlotTable } from './slots.ts'
import type { TransferKind, Transfers } from './transfers.ts'

/** What lets a sequence go on where it was: its columns outside of memory, or on their way. */
export interface Image {
  /** back: all is in memory; lost: a transfer failed, or it was dropped. Its places are free. */
  state: 'leaving' | 'out' | 'coming' | 'back' | 'lost'
  /** Tokens whose keys and values it has. */
  readonly tokens: number
  /** What of them stays in memory, because others use it too; up to a column's end. */
  readonly shared: readonly KvSpan[]
  /** The image itself keeps `shared` in memory; while it is coming, its slot does. */
  pinned: boolean
  /** The column in the first of `places`. */
  readonly first: number
  readonly places: Uint32Array
  /** While leaving or coming; else -1. */
  slot: number
  /** Pages that will be free when it has left. */
  pages: number
  /** When it began to leave. */
  readonly sinceMs: number
  /** Transfers under way. */
  pending: number
  failed: boolean
  dropped: boolean
}

export class Tiers {
  private readonly transfers: Transfers
  private readonly slots: SlotTable
  /** All that is not back or lost. */
  readonly images = new Set<Image>()
  /** Whose state has changed since `poll` was last called. */
  private changed: Image[] = []

  constructor(transfers: Transfers, slots: SlotTable) {
    this.transfers = transfers
    this.slots = slots
  }

  /** Pages that become free when what is leaving has left, without anybody's doing. */
  get leavingPages(): number {
    let pages = 0
    for (const image of this.images) if (image.state === 'leaving') pages += image.pages
    return pages
  }

  /** Slots that are nobody's while their columns leave. */
  get leavingSlots(): number {
    let slots = 0
    for (const image of this.images) if (image.state === 'leaving') slots++
    return slots
  }

  /** Columns that would have to be written for a slot of `tokens` tokens to leave. */
  columnsToMove(slot: number, tokens: number): number {
    return columnsFor(this.slots.layout, tokens) - this.firstToMove(slot, tokens)
  }

  /**
   * Begins to move out the first `tokens` tokens of a held slot, which is the image's from now on:
   * nobody may write to it.
   * @returns undefined, with nothing changed, if the tier has no room, or the slot has just been
   *   forked and not written to
   */
  out(slot: number, tokens: number): Image | undefined {
    const { slots } = this
    const { layout } = slots
    if (slots.isPending(slot)) return undefined
    const first = this.firstToMove(slot, tokens)
    const places = this.transfers.places.take(columnsFor(layout, tokens) - first)
    if (!places) return undefined
    const shared = clipSpans(slots.spansOf(slot, tokens), tokensBefore(layout, first))
    slots.pin(shared)
    const pages = (Math.max(slots.ownColumns(slot).end, first) - first) * layout.ranges
    const counts = { pages, pending: 0, failed: false, dropped: false }
    const image: Image = {
      state: 'leaving',
      tokens,
      shared,
      pinned: true,
      first,
      places,
      slot,
      sinceMs: this.transfers.nowMs,
      ...counts,
    }
    this.images.add(image)
    for (const columns of this.columnsOf(slot, tokens)) {
      const from = Math.max(columns.first, first)
      if (from < columns.end) this.transfer(image, 'save', { ...columns, first: from })
    }
    // Nothing to write: all of it stays in memory for others.
    if (image.pending === 0) this.settle(image)
    return image
  }

  /**
   * Begins to fill a slot that was acquired with `image.shared`, and grown: what the image kept in
   * memory, the slot keeps now.
   * @returns true if there is nothing to fill: it is back
   */
  back(image: Image, slot: number): boolean {
    assert(image.state === 'out' && image.pinned, 'what comes back was out')
    image.state = 'coming'
    image.pinned = false
    image.slot = slot
    image.failed = false
    image.pages = this.slots.pagesOf(slot)
    const { region, first } = this.slots.ownColumns(slot)
    assert(first === image.first, 'a slot begins where its image does')
    const columns = { region, first, end: first + image.places.length }
    if (image.places.length > 0) this.transfer(image, 'load', columns)
    else this.settle(image)
    return image.places.length === 0
  }

  /** What is coming shall not run after all: its slot is the image's again until it is out. */
  stop(image: Image): void {
    assert(image.state === 'coming', 'what is stopped was coming')
    image.state = 'leaving'
  }

  /** Forgets an image, at once or when what is under way has ended. */
  drop(image: Image): void {
    image.dropped = true
    if (image.state === 'coming') image.state = 'leaving'
    if (image.state === 'out') this.forget(image, 'lost')
  }

  /**
   * Images whose state has changed since the last call: from leaving to out, from coming to back
   * (its slot has `tokens` tokens in memory), or from either to lost.
   * @throws LatticeError `pager_failed`
   */
  poll(nowMs: number): Image[] {
    this.transfers.poll(nowMs)
    const { changed } = this
    this.changed = []
    return changed
  }

  /** What images keep in memory. */
  *holds(): Generator<KvColumns> {
    for (const { pinned, shared } of this.images) {
      if (pinned && shared.length > 0) yield* spannedColumns(this.slots.layout, shared)
    }
  }

  *placesHeld(): Generator<Uint32Array> {
    for (const { places } of this.images) yield places
  }

  private transfer(image: Image, kind: TransferKind, columns: KvColumns): void {
    const at = columns.first - image.first
    const places = image.places.subarray(at, at + columns.end - columns.first)
    image.pending++
    this.transfers.begin(kind, columns, places, (error) => {
      image.pending--
      if (error) image.failed = true
      if (image.pending > 0) return
      if (!image.dropped) this.changed.push(image)
      this.settle(image)
    })
  }

  /** Nothing of it is under way any more. */
  private settle(image: Image): void {
    const { slots } = this
    const { slot, failed, dropped, state } = image
    image.slot = -1
    if (state === 'coming' && !failed) return this.forget(image, 'back')
    if (!image.pinned && !dropped && !failed) {
      slots.pin(image.shared)
      image.pinned = true
    }
    slots.retire(slot, -Infinity)
    if (dropped || failed) this.forget(image, 'lost')
    else image.state = 'out'
  }

  private forget(image: Image, state: 'back' | 'lost'): void {
    if (image.pinned) this.slots.unpin(image.shared)
    image.pinned = false
    this.transfers.places.give(image.places)
    this.images.delete(image)
    image.state = state
  }

  /** Where each column of a slot lies: in others' regions, then in its own. */
  private columnsOf(slot: number, tokens: number): KvColumns[] {
    const { layout } = this.slots
    const own = this.slots.ownColumns(slot)
    const others = this.slots.spansOf(slot, tokens).map(({ region, from, to }) => {
      const end = Math.min(fullColumns(layout, to), own.first)
      return { region, first: fullColumns(layout, from), end }
    })
    const columns = [...others, { ...own, end: columnsFor(layout, tokens) }]
    return columns.filter(({ first, end }) => end > first)
  }

  /** The column from which on nobody but this slot's sequence uses what it has. */
  private firstToMove(slot: number, tokens: number): number {
    const { layout, regions } = this.slots
    let first = columnsFor(layout, tokens)
    for (const columns of this.columnsOf(slot, tokens).toReversed()) {
      while (first > columns.first && regions.hasOneUser(columns.region, first - 1)) first--
      if (first > columns.first) break
    }
    // What stays in memory ends with a column and with a token: none is copied when it is back.
    return tokenAlignedColumn(layout, Math.min(first, fullColumns(layout, tokens)))
  }
}

function tokensBefore(layout: KvLayout, column: number): number {
  return (column * layout.shape.pageBytes) / layout.tokenStride
}
