// Owns what sequences have outside of memory: which place of the tier holds which column, and what
// is on its way out or back. It decides nothing about who goes: the scheduler does.
//
//   slot ──out──▶ leaving ──saved──▶ out ──back──▶ coming ──loaded──▶ slot
//                    ▲                                │
//                    └────────────stop────────────────┘   (its places still hold it)

import { assert } from '../assert.ts'
import {
  columnsFreed,
  columnsIn,
  type Image,
  type ImageParts,
  partsOf,
  pieceIn,
  regionsOf,
  shownIn,
  tokensBefore,
} from './image.ts'
import {
  clipSpans,
  type KvColumns,
  mergeSpans,
  overlapAny,
  sharedColumns,
  spannedColumns,
} from './regions.ts'
import type { SlotTable } from './slots.ts'
import type { TransferKind, Transfers } from './transfers.ts'

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
    for (const image of this.images) if (image.state === 'leaving') slots += image.slots.length
    return slots
  }

  /**
   * What of slots of `tokens` tokens each would go together.
   * @returns undefined if a slot alone has just been forked and not written to
   */
  partsOf(slots: readonly number[], tokens: number): ImageParts | undefined {
    const [slot = -1] = slots
    if (slots.length === 1 && this.slots.isPending(slot)) return undefined
    return partsOf(this.slots, slots, tokens)
  }

  /**
   * Begins to move out held slots of `tokens` tokens each, which are the image's from now on:
   * nobody may write to them.
   * @returns undefined, with nothing changed, if the tier has no room
   */
  out(slots: readonly number[], tokens: number, parts: ImageParts): Image | undefined {
    const table = this.slots
    const { layout } = table
    const places = this.transfers.places.take(columnsIn(parts.pieces))
    if (!places) return undefined
    const [slot = -1] = slots
    const all = clipSpans(table.spansOf(slot, tokens), tokensBefore(layout, parts.first))
    // As slots will show it that come back: they hold no more than that.
    const shared = mergeSpans(layout, all)
    const image: Image = {
      state: 'leaving',
      tokens,
      shared,
      pinned: false,
      parts,
      places,
      slots,
      pages: columnsFreed(table, slots, parts.first) * layout.ranges,
      sinceMs: this.transfers.nowMs,
      pending: 0,
      failed: false,
      refused: false,
      dropped: false,
    }
    this.images.add(image)
    this.pin(image)
    this.transfer(image, 'save', parts.pieces)
    // Nothing to write: all of it stays in memory for others.
    if (image.pending === 0) this.settle(image)
    return image
  }

  /**
   * Finds slots for what comes back, and begins to fill them; what the image kept in memory, they
   * keep now. There must be memory for its pages (`pagesBack`).
   * @returns the slots; undefined, with nothing changed, if too few of them or regions are free
   */
  back(image: Image): readonly number[] | undefined {
    assert(image.state === 'out' && image.pinned, 'what comes back was out')
    const { slots: table } = this
    const { layout } = table
    const { parts } = image
    if (table.freeSlots < parts.shown.length) return undefined
    const regions = this.takeRegions(regionsOf(parts))
    if (!regions) return undefined
    const pieces = parts.pieces.map((piece) => pieceIn(regions, parts, piece))
    for (const { region, first, end } of pieces) table.regions.mover.grow?.(region, first, end)
    const shown = parts.shown.map((slot) => shownIn(layout, regions, parts, slot))
    const slots = shown.map((slot) => table.acquireShown(slot))
    image.slots = slots
    const own = new Set(shown.map(({ region }) => region))
    for (const region of regions.values()) if (!own.has(region)) table.regions.leave(region)
    this.unpin(image)
    image.failed = false
    image.refused = false
    image.state = 'coming'
    this.transfer(image, 'load', pieces)
    if (image.pending === 0) this.settle(image)
    return slots
  }

  /**
   * What is coming shall not run after all: its slot is the image's again until it is out.
   * @param refused there is no memory for all of it
   */
  stop(image: Image, refused: boolean): void {
    assert(image.state === 'coming', 'what is stopped was coming')
    image.state = 'leaving'
    image.refused = refused
  }

  /** Of what is leaving, some was given columns just before that have no memory. */
  undo(lacking: readonly KvColumns[]): void {
    for (const image of this.images) {
      if (image.state !== 'leaving') continue
      const held = image.slots.flatMap((slot) => this.slots.columnsHeld(slot))
      if (overlapAny(held, lacking)) image.refused = true
      // What was on its way back is in its places still; what is written out is nowhere else.
      if (image.pinned && overlapAny(image.parts.pieces, lacking)) image.failed = true
    }
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
    for (const image of this.images) if (image.pinned) yield* this.kept(image)
  }

  *placesHeld(): Generator<Uint32Array> {
    for (const { places } of this.images) yield places
  }

  /** For each of these a region that nobody else takes; undefined if there are too few. */
  private takeRegions(before: Iterable<number>): Map<number, number> | undefined {
    const { regions } = this.slots
    const taken = new Map<number, number>()
    for (const region of before) {
      const now = regions.take(-1)
      if (now < 0) {
        for (const other of taken.values()) regions.leave(other)
        return undefined
      }
      taken.set(region, now)
    }
    return taken
  }

  private transfer(image: Image, kind: TransferKind, pieces: readonly KvColumns[]): void {
    let at = 0
    image.pending += pieces.length
    for (const columns of pieces) {
      const count = columns.end - columns.first
      const places = image.places.subarray(at, at + count)
      at += count
      this.transfers.begin(kind, columns, places, (error) => {
        image.pending--
        if (error) image.failed = true
        if (image.pending > 0) return
        if (!image.dropped) this.changed.push(image)
        this.settle(image)
      })
    }
  }

  /** Nothing of it is under way any more. */
  private settle(image: Image): void {
    const { slots: table } = this
    const { slots, failed, dropped, state } = image
    image.slots = []
    if (state === 'coming' && !failed) return this.forget(image, 'back')
    if (!image.pinned && !dropped && !failed) this.pin(image)
    for (const slot of slots) table.retire(slot, image.refused ? 'gone' : -Infinity)
    if (dropped || failed) this.forget(image, 'lost')
    else image.state = 'out'
  }

  private pin(image: Image): void {
    for (const columns of this.kept(image)) this.slots.regions.hold(columns, 'live')
    image.pinned = true
  }

  private unpin(image: Image): void {
    for (const columns of this.kept(image)) this.slots.regions.drop(columns, 'live')
    image.pinned = false
  }

  /** What slots hold of what stays in memory: beams that were forked only what they map. */
  private kept({ shared, parts }: Image): KvColumns[] {
    const { layout } = this.slots
    const forked = parts.shown.every(({ beam }) => beam)
    return forked ? sharedColumns(layout, shared) : spannedColumns(layout, shared)
  }

  private forget(image: Image, state: 'back' | 'lost'): void {
    if (image.pinned) this.unpin(image)
    this.transfers.places.give(image.places)
    this.images.delete(image)
    image.state = state
  }
}
