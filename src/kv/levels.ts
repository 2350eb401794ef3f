// Owns where the places of a tier of two levels lie: in frames of memory, or on the disk beneath.
// Whatever comes goes to a frame; what was used longest ago makes room, and what is wanted back
// from the disk comes through a few frames that are kept for that.
//
//   save ──▶ frame ──spill, oldest first──▶ below ──stage──▶ frame of the reserve ──▶ load
//              ▲ └────────────load─────────────────────────────────│─────────────────▶
//              └──────────────────if there is room─────────────────┘

import { assert, present } from '../assert.ts'
import { PlaceTable } from './places.ts'

/** Frames that what comes from below passes through, if there are so many. */
const RESERVE_FRAMES = 64

/** Of the frames, what is kept free for whoever comes: more than a disk takes in half a second. */
const FREE_SHARE = 1 / 8
const FREE_FRAMES_MAX = 512

/** What a place has goes from its frame to one below. */
export interface Spill {
  place: number
  frame: number
  below: number
  held: Held
}

export interface Held {
  /** -1: it is not in memory. */
  frame: number
  /** -1: it is not below. */
  below: number
  /** Loads that read its frame. */
  pins: number
  spilling: boolean
  /** Nobody needs it any more: its frame goes when its spill has ended. */
  dead: boolean
}

export class Levels {
  readonly frames: number
  readonly capacity: number
  private readonly reserve: number
  private readonly inFrames: PlaceTable
  private readonly inBelow: PlaceTable
  private readonly held = new Map<number, Held>()
  /** Places that may be spilled, longest unused first. */
  private readonly order = new Set<number>()
  private staged = 0
  /** Spills under way, and of them those of places that nobody needs any more. */
  private spilling = 0
  private dying = 0

  /** @param below places on disk; 0 is no disk */
  constructor(frames: number, below: number) {
    this.frames = frames
    this.reserve = below === 0 ? 0 : Math.min(RESERVE_FRAMES, frames >> 1)
    this.capacity = frames - this.reserve + below
    this.inFrames = new PlaceTable(frames)
    this.inBelow = new PlaceTable(below)
  }

  /** Frames whose content nobody has elsewhere. */
  get usedFrames(): number {
    return this.inFrames.used - this.staged
  }

  get usedBelow(): number {
    return this.inBelow.used
  }

  /** Frames that can be had at once for what comes. */
  get room(): number {
    return Math.max(0, this.frames - this.reserve - this.usedFrames)
  }

  /** Frames that should be emptied, as far as there is a disk. */
  get short(): number {
    if (this.inBelow.capacity === 0) return 0
    const share = Math.ceil((this.frames - this.reserve) * FREE_SHARE)
    const wanted = Math.min(FREE_FRAMES_MAX, share)
    return Math.max(0, wanted - this.room - this.spilling)
  }

  /** The frame that a place lies in, or -1: it is below. */
  frameOf(place: number): number {
    return this.of(place).frame
  }

  /** The place below that a place has. */
  belowOf(place: number): number {
    const { below } = this.of(place)
    assert(below >= 0, `place ${place} is below`)
    return below
  }

  isBelow(place: number): boolean {
    return this.held.get(place)?.frame === -1
  }

  /** Takes frames, of which there must be room, for what is about to be written. */
  fill(places: Uint32Array): Uint32Array {
    assert(places.length <= this.room, 'there are frames for what comes')
    const frames = present(this.inFrames.take(places.length), 'free frames')
    places.forEach((place, i) => {
      assert(!this.held.has(place), `place ${place} is empty`)
      const frame = present(frames[i], 'a frame')
      this.held.set(place, { frame, below: -1, pins: 0, spilling: false, dead: false })
    })
    return frames
  }

  /** They are written: they may be spilled. */
  filled(places: Uint32Array): void {
    for (const place of places) if (this.held.has(place)) this.order.add(place)
  }

  /** Somebody reads a place's frame, which stays meanwhile. */
  pin(place: number): void {
    this.of(place).pins++
    if (this.order.delete(place)) this.order.add(place)
  }

  unpin(place: number): void {
    const held = this.of(place)
    assert(held.pins > 0, `place ${place} is read`)
    held.pins--
  }

  /** Takes up to `count` frames for what comes from below, or undefined if there are none. */
  stage(count: number): Uint32Array | undefined {
    const most = Math.min(count, this.reserve - this.staged)
    if (most <= 0) return undefined
    const frames = present(this.inFrames.take(most), 'frames of the reserve')
    this.staged += most
    return frames
  }

  /**
   * What came from below has been read from a staged frame: it was used just now, so it stays there
   * if there is room, and leaves the disk.
   */
  unstage(place: number, frame: number): void {
    const stays = this.room > 0
    this.staged--
    if (!stays) return this.inFrames.give(Uint32Array.of(frame))
    const held = this.of(place)
    this.inBelow.give(Uint32Array.of(held.below))
    held.below = -1
    held.frame = frame
    this.order.add(place)
  }

  /** What should have come to a staged frame did not. */
  giveStage(frames: Uint32Array): void {
    this.staged -= frames.length
    this.inFrames.give(frames)
  }

  /** Up to `count` places that shall go below, which begins now. */
  spill(count: number): Spill[] {
    const spills: Spill[] = []
    for (const place of this.order) {
      if (spills.length === count) break
      const held = this.of(place)
      if (held.pins > 0 || held.spilling) continue
      const below = this.inBelow.take(1)?.[0]
      if (below === undefined) break
      held.spilling = true
      this.spilling++
      spills.push({ place, frame: held.frame, below, held })
    }
    return spills
  }

  /** A spill has ended; if it failed, what it has stays in its frame. */
  spilled({ place, frame, below, held }: Spill, failed: boolean): void {
    held.spilling = false
    this.spilling--
    if (held.dead) this.dying--
    const stays = failed || held.pins > 0
    if (held.dead || stays) this.inBelow.give(Uint32Array.of(below))
    if (stays && !held.dead) return
    this.inFrames.give(Uint32Array.of(frame))
    if (held.dead) return
    this.order.delete(place)
    held.frame = -1
    held.below = below
  }

  /** Nobody needs a place any more, if anything lies there. */
  forget(place: number): void {
    const held = this.held.get(place)
    if (!held) return
    assert(held.pins === 0, `nobody reads place ${place} any more`)
    held.dead = true
    this.held.delete(place)
    this.order.delete(place)
    if (held.spilling) this.dying++
    else if (held.frame >= 0) this.inFrames.give(Uint32Array.of(held.frame))
    if (held.below >= 0) this.inBelow.give(Uint32Array.of(held.below))
  }

  /** Throws unless each frame and each place below is one place's. */
  check(): void {
    const frames = new Set<number>()
    const below = new Set<number>()
    for (const held of this.held.values()) {
      assert(held.frame >= 0 !== held.below >= 0, 'a place has one of both')
      ;(held.frame >= 0 ? frames : below).add(Math.max(held.frame, held.below))
    }
    assert(frames.size + below.size === this.held.size, 'each is of one place')
    const { staged, spilling, dying } = this
    assert(frames.size + dying + staged === this.inFrames.used, 'frames are as many as are used')
    assert(below.size + spilling === this.inBelow.used, 'and so are places below')
  }

  private of(place: number): Held {
    return present(this.held.get(place), `place ${place}`)
  }
}
