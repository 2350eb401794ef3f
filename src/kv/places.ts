// Owns which places of a tier are free. Neighbours are handed out together where they can be: what
// lies together on a disk is read in one go.

import { assert, present } from '../assert.ts'

export class PlaceTable {
  readonly capacity: number
  used = 0
  /**
   * Frees places that somebody can do without, so many if it can; set by whoever has such.
   * @param copies also of what is in memory
   */
  makeRoom: (count: number, copies: boolean) => void = () => {}
  /** Told of a place that nobody holds any more. */
  onFree: (place: number) => void = () => {}
  private readonly holders: Uint16Array
  /** Where the last search ended. */
  private next = 0

  constructor(capacity: number) {
    this.capacity = capacity
    this.holders = new Uint16Array(capacity)
  }

  /**
   * Takes `count` places. Undefined, with nothing taken, if fewer can be had.
   * @param overCopies copies of what is in memory may go for it
   */
  take(count: number, overCopies = true): Uint32Array | undefined {
    const missing = count - (this.capacity - this.used)
    if (missing > 0 && count <= this.capacity) this.makeRoom(missing, overCopies)
    if (count > this.capacity - this.used) return undefined
    const places = new Uint32Array(count)
    for (let i = 0; i < count; this.next++) {
      if (this.next >= this.capacity) this.next = 0
      if (this.holders[this.next] !== 0) continue
      this.holders[this.next] = 1
      places[i++] = this.next
    }
    this.used += count
    return places
  }

  /** Takes places that hold something already, or holds them, too. */
  claim(places: Uint32Array): void {
    for (const place of places) {
      if (this.holders[place] !== 0) this.share(place)
      else {
        this.holders[place] = 1
        this.used++
      }
    }
  }

  isHeld(place: number): boolean {
    return (this.holders[place] ?? 0) > 0
  }

  /** Another one holds a place, too. */
  share(place: number): void {
    const count = present(this.holders[place], 'a place')
    assert(count > 0 && count < 2 ** 16 - 1, `place ${place} is taken`)
    this.holders[place] = count + 1
  }

  give(places: Uint32Array): void {
    for (const place of places) {
      const count = present(this.holders[place], 'a place')
      assert(count > 0, `place ${place} is taken`)
      this.holders[place] = count - 1
      if (count > 1) continue
      this.used--
      this.onFree(place)
    }
  }

  /** Throws unless these are all that is held, each as often as it is given here. */
  check(held: Iterable<Uint32Array>): void {
    const counts = new Uint16Array(this.capacity)
    for (const places of held) for (const place of places) counts[place]!++
    const wrong = counts.findIndex((count, place) => count !== this.holders[place])
    assert(wrong < 0, `place ${wrong} is held as often as it is counted`)
  }
}
