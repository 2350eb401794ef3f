// Owns how a sequence gets its memory and loses it: a slot with all pages of a prompt, or what an
// image brings back; pages that are warm or only cached go first. Who gets memory and who has to
// give way, the scheduler decides.

import { assert } from '../assert.ts'
import { type KvSpan, spannedTokens } from '../kv/regions.ts'
import type { SlotTable } from '../kv/slots.ts'
import type { Image } from '../kv/tiers.ts'
import type { Preemption, Schedulable, Sharing } from './scheduler.ts'

export class Residence<S extends Schedulable> {
  /** Sequences that made room, by how they were to come back. */
  readonly preemptions = { offload: 0, recompute: 0 }
  private readonly slots: SlotTable
  private readonly sharing: Sharing<S>
  private readonly preemption: Preemption | undefined

  constructor(slots: SlotTable, sharing: Sharing<S>, preemption: Preemption | undefined) {
    this.slots = slots
    this.sharing = sharing
    this.preemption = preemption
  }

  /**
   * Finds a slot and pages for a sequence that begins with `shared`. False: there is no room.
   * @param when 'grow later': it gets its pages in the step that writes its next token
   */
  place(sequence: S, shared: readonly KvSpan[], when?: 'grow later'): boolean {
    const { slots } = this
    // One token more than it has: else its first output could throw it out again at once.
    const tokens = sequence.length + 1
    if (!slots.fits(tokens, shared)) return false
    slots.pin(shared)
    const slot = shared.length > 0 ? this.acquireFresh(shared) : this.acquire(tokens)
    if (slot < 0) {
      slots.unpin(shared)
      return false
    }
    sequence.slot = slot
    sequence.computed = spannedTokens(shared)
    if (when === 'grow later') return true
    assert(this.grow(slot, tokens), 'a sequence that fits gets its pages')
    return true
  }

  /** Finds a slot and pages for a sequence whose image is out, and begins to fill them. */
  resume(sequence: S, image: Image): boolean {
    const tokens = sequence.length + 1
    if (!this.slots.fits(tokens, image.shared)) return false
    const slot = this.acquireFresh(image.shared)
    if (slot < 0) return false
    sequence.slot = slot
    assert(this.grow(slot, tokens), 'a sequence that fits gets its pages')
    if (this.preemption?.tiers.back(image, slot)) this.isBack(sequence, image)
    return true
  }

  /** All that a sequence's image had is in its slot. */
  isBack(sequence: S, image: Image): void {
    sequence.computed = image.tokens
    sequence.image = undefined
  }

  /**
   * Its pages are moved out, or given back if they are sooner computed again.
   * @param beginsAgain what it has is of no use to it
   */
  vacate(sequence: S, beginsAgain: boolean): void {
    if (beginsAgain && sequence.image) {
      this.forgetImage(sequence, sequence.image)
      sequence.computed = 0
      return
    }
    const moves = beginsAgain ? false : this.moveOut(sequence)
    if (!moves) this.slots.retire(sequence.slot, -Infinity)
    this.preemptions[moves ? 'offload' : 'recompute']++
    sequence.preemptions++
    sequence.slot = -1
    sequence.computed = 0
  }

  /** What a sequence has outside of memory, or on the way, is of no more use. */
  forgetImage(sequence: S, image: Image): void {
    this.preemption?.tiers.drop(image)
    sequence.image = undefined
    sequence.slot = -1
  }

  grow(slot: number, tokens: number): boolean {
    while (!this.slots.grow(slot, tokens)) if (!this.reclaimOne()) return false
    return true
  }

  reclaimOne(): boolean {
    return this.slots.reclaim(Infinity) >= 0 || this.sharing.evict()
  }

  private moveOut(sequence: S): boolean {
    const { slot, computed, promptLength, image } = sequence
    if (!this.preemption) return false
    const { tiers } = this.preemption
    // It was on its way back.
    if (image) tiers.stop(image)
    if (image || computed === 0) return image !== undefined
    const pages = tiers.columnsToMove(slot, computed) * this.slots.layout.ranges
    const outputs = Math.max(0, computed - promptLength)
    if (!this.preemption.preferMoving(pages, computed - outputs, outputs)) return false
    sequence.image = tiers.out(slot, computed)
    return sequence.image !== undefined
  }

  private acquire(tokens: number): number {
    for (;;) {
      const slot = this.slots.acquire(tokens)
      if (slot >= 0 || !this.reclaimOne()) return slot
    }
  }

  /** A slot that nobody has written to. */
  private acquireFresh(shared: readonly KvSpan[]): number {
    for (;;) {
      const slot = this.slots.acquireShared(shared)
      if (slot >= 0 || !this.reclaimOne()) return slot
    }
  }
}
