// Owns which places of a tier are free. Neighbours are handed out together where they can be: what
// lies together on a disk is read in one go.

import { assert } from '../assert.ts'

export class PlaceTable {
  readonly capacity: number
  used = 0
  private readonly taken: Uint8Array
  /** Where the last search ended. */
  private next = 0

  constructor(capacity: number) {
    this.capacity = capacity
    this.taken = new Uint8Array(capacity)
  }

  /** Takes `count` places. Undefined, with nothing changed, if fewer are free. */
  take(count: number): Uint32Array | undefined {
    if (count > this.capacity - this.used) return undefined
    const places = new Uint32Array(count)
    for (let i = 0; i < count; this.next++) {
      if (this.next >= this.capacity) this.next = 0
      if (this.taken[this.next] === 1) continue
      this.taken[this.next] = 1
      places[i++] = this.next
    }
    this.used += count
    return places
  }

  give(places: Uint32Array): void {
    for (const place of places) {
      assert(this.taken[place] === 1, `place ${place} is taken`)
      this.taken[place] = 0
    }
    this.used -= places.length
  }
}
