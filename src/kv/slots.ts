// Owns who holds which slot and how many physical pages each one has: the account that keeps KV
// memory under its limit before a page is touched. Pure bookkeeping; a backend moves the memory.
//
//   free ──acquire──▶ held ──retire──▶ warm ──reclaim──▶ free
//                      ▲                 │
//                      └─────acquire─────┘   (its pages are reused in place)
//
// A warm slot keeps the pages of the sequence that ended, for one that will soon overwrite them:
// faulting a page in costs more than writing to it. They count as used until reclaimed.

import { assert, present } from '../assert.ts'
import { type KvLayout, pagesFor } from './layout.ts'

const FREE = 0
const HELD = 1
const WARM = 2

interface WarmSlot {
  slot: number
  sinceMs: number
}

export class SlotTable {
  readonly layout: KvLayout
  readonly limitPages: number
  /** Pages of held and warm slots together. */
  usedPages = 0
  private readonly state: Uint8Array
  private readonly pages: Int32Array
  /** Longest warm first. */
  private readonly warm: WarmSlot[] = []

  constructor(layout: KvLayout, slots: number, limitPages: number) {
    this.layout = layout
    this.limitPages = limitPages
    this.state = new Uint8Array(slots)
    this.pages = new Int32Array(slots)
  }

  /** When the longest-warm slot turned warm; undefined if none is. */
  get warmSinceMs(): number | undefined {
    return this.warm[0]?.sinceMs
  }

  pagesOf(slot: number): number {
    return this.pages[slot] ?? 0
  }

  /** Pages that could be had now, counting those of warm slots. */
  availablePages(): number {
    let available = this.limitPages - this.usedPages
    for (const { slot } of this.warm) available += this.pagesOf(slot)
    return available
  }

  /**
   * Takes a slot for a sequence that is about to hold `tokens` tokens: a warm one whose pages those
   * tokens will all overwrite, else the lowest free one. -1 if every slot is held or too large.
   */
  acquire(tokens: number): number {
    const needed = pagesFor(this.layout, tokens)
    const reusable = this.warm.findIndex(({ slot }) => this.pagesOf(slot) <= needed)
    const slot =
      reusable >= 0
        ? present(this.warm.splice(reusable, 1)[0], 'a warm slot').slot
        : this.state.indexOf(FREE)
    if (slot >= 0) this.state[slot] = HELD
    return slot
  }

  /**
   * Accounts for the pages that a held slot needs to hold `tokens` tokens.
   * @returns false, with nothing changed, if that would exceed the limit.
   */
  grow(slot: number, tokens: number): boolean {
    assert(this.state[slot] === HELD, 'only a held slot grows')
    const more = pagesFor(this.layout, tokens) - this.pagesOf(slot)
    if (more <= 0) return true
    if (this.usedPages + more > this.limitPages) return false
    this.usedPages += more
    this.pages[slot] = this.pagesOf(slot) + more
    return true
  }

  /**
   * The sequence has ended: its slot turns warm.
   * @param sinceMs now, or -Infinity if no successor is in sight: then it is reclaimed first
   */
  retire(slot: number, sinceMs: number): void {
    assert(this.state[slot] === HELD, 'only a held slot retires')
    this.state[slot] = WARM
    let at = this.warm.length
    while (at > 0 && present(this.warm[at - 1], 'a warm slot').sinceMs > sinceMs) at--
    this.warm.splice(at, 0, { slot, sinceMs })
  }

  /**
   * The longest-warm slot that turned warm at or before `untilMs`, now free in the account: the
   * caller gives its pages back to the kernel before anything else happens. -1 if there is none.
   */
  reclaim(untilMs: number): number {
    const longest = this.warm[0]
    if (!longest || longest.sinceMs > untilMs) return -1
    this.warm.shift()
    this.usedPages -= this.pagesOf(longest.slot)
    this.pages[longest.slot] = 0
    this.state[longest.slot] = FREE
    return longest.slot
  }

  /** Throws if the counts contradict each other. */
  check(): void {
    let used = 0
    this.pages.forEach((count, slot) => {
      assert(count === 0 || this.state[slot] !== FREE, `free slot ${slot} holds no pages`)
      used += count
    })
    assert(used === this.usedPages, 'used pages are the sum over slots')
    assert(used <= this.limitPages, 'used pages keep to the limit')
    for (const { slot } of this.warm) assert(this.state[slot] === WARM, `slot ${slot} is warm`)
  }
}
