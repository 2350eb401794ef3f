// Owns how a sequence gets its memory and loses it: a slot with all pages of a prompt, or what an
// image brings back; pages that are warm or only cached go first. Who gets memory and who has to
// give way, the scheduler decides.

import { assert, present } from '../assert.ts'
import { columnsIn, type Image, pagesBack } from '../kv/image.ts'
import { type KvSpan, spannedTokens } from '../kv/regions.ts'
import type { SlotTable } from '../kv/slots.ts'
import type { Preemption, Schedulable, Sharing } from './schedulable.ts'

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

  /** Finds slots and pages for those whose image is out, and begins to fill them. */
  resume(members: readonly S[], image: Image): boolean {
    const { slots } = this
    const { length } = present(members[0], 'a member')
    const pages = pagesBack(slots.layout, image, length + 1)
    if (!this.preemption || pages > slots.availablePages()) return false
    while (slots.usedPages + pages > slots.limitPages) if (!this.reclaimOne()) return false
    let found: readonly number[] | undefined
    while (!(found = this.preemption.tiers.back(image))) if (!this.reclaimOne()) return false
    members.forEach((member, i) => {
      member.slot = present(found?.[i], 'a slot')
      // A fork grows when what it copies is there.
      if (slots.isPending(member.slot)) return
      assert(this.grow(member.slot, member.length + 1), 'a sequence that fits gets its pages')
    })
    if (image.state === 'back') this.isBack(members, image)
    return true
  }

  /** All that an image had is in the slots of its sequences. */
  isBack(members: readonly S[], image: Image): void {
    for (const member of members) {
      member.computed = image.tokens
      member.image = undefined
    }
  }

  /**
   * Pages of those that go together are moved out, or given back if they are sooner computed again.
   * What was on its way back to them has never left where it was.
   * @param refused not all of the memory that they were given is there
   * @returns whether they are moved
   */
  vacate(members: readonly S[], refused: boolean): boolean {
    const image = this.moveOut(members, refused)
    for (const member of members) {
      if (!image) this.slots.retire(member.slot, refused ? 'gone' : -Infinity)
      this.preemptions[image ? 'offload' : 'recompute']++
      member.preemptions++
      member.image = image
      member.slot = -1
      member.computed = 0
    }
    return image !== undefined
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

  private moveOut(members: readonly S[], refused: boolean): Image | undefined {
    const { computed, promptLength, image } = present(members[0], 'a member')
    if (!this.preemption) return undefined
    const { tiers } = this.preemption
    // It was on its way back.
    if (image) tiers.stop(image, refused)
    if (image || refused || computed === 0) return image
    const slots = members.map(({ slot }) => slot)
    const parts = tiers.partsOf(slots, computed)
    if (!parts) return undefined
    const pages = columnsIn(parts.pieces) * this.slots.layout.ranges
    const outputs = Math.max(0, computed - promptLength)
    const worth = this.preemption.preferMoving(pages, computed - outputs, slots.length * outputs)
    return worth ? tiers.out(slots, computed, parts) : undefined
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
