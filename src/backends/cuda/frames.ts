// Owns the GPU's physical memory for KV: frames of one column, or of a whole group of columns where
// that many are needed at once, since mapping costs by the piece and not by the byte.
//
//   (nothing) ──create──▶ free ──take──▶ used ──lapse──▶ lapsed ──▶ free ──release──▶ (nothing)
//                                         ▲                │
//                                         └────revive──────┘   where it is mapped already
//
// A lapsed frame is nobody's, but still mapped: whoever needs memory at its very place has it at
// once; for any other place it is unmapped, after the steps that could still touch it.

import { assert, present } from '../../assert.ts'
import type { KvColumns } from '../../kv/regions.ts'
import type { StepFence } from './fence.ts'
import type { Pager } from './pager.ts'

export interface Frame {
  readonly id: number
  readonly columns: number
  state: 'free' | 'used' | 'lapsed' | 'spare'
  /** Where it belongs: a region, and its first column there. */
  region: number
  column: number
  /** Addresses where it is mapped: in its own region, and in others that share it. */
  readonly views: Set<number>
  /** Columns of it that are held. */
  held: number
  /** While lapsed: steps that may touch it. */
  steps: number
  /** Of the pager: when it is mapped in its own region. */
  ticket: number
  /** There was no memory for it: it goes as soon as nobody holds it. */
  absent: boolean
}

const NOWHERE: KvColumns = { region: -1, first: 0, end: 0 }

export class FramePool {
  readonly pageBytes: number
  readonly groupColumns: number
  limitColumns: number
  /** Columns of all frames there are. */
  columns = 0
  /** How often a frame was needed before the steps that read it were over. */
  fenceWaits = 0
  /** Of these, columns of frames that are held although there was no memory for them. */
  absentColumns = 0
  private readonly pager: Pager
  private readonly fence: StepFence
  private readonly freeSmall: Frame[] = []
  /** Beside the limit, of one column each: for those of a frame that is taken apart. */
  private readonly spares: Frame[] = []
  private readonly freeLarge: Frame[] = []
  /** Longest lapsed first; frames that were revived since are passed over. */
  private lapsed: Frame[] = []
  private lapsedCount = 0
  private readonly onUnmap: (frame: Frame, address: number) => void
  private nextId = 0
  /** By id: those that there are. */
  private readonly frames: (Frame | undefined)[] = []
  private readonly spareIds: number[] = []

  /** @param onUnmap hears of each view that goes */
  constructor(
    pager: Pager,
    fence: StepFence,
    shape: { pageBytes: number; groupColumns: number; limitColumns: number },
    onUnmap: (frame: Frame, address: number) => void,
  ) {
    this.pager = pager
    this.fence = fence
    this.pageBytes = shape.pageBytes
    this.groupColumns = shape.groupColumns
    this.limitColumns = shape.limitColumns
    this.onUnmap = onUnmap
  }

  /** Of which no more than the limit are taken. */
  get presentColumns(): number {
    return this.columns - this.absentColumns
  }

  get residentBytes(): number {
    return this.presentColumns * this.pageBytes
  }

  /** Whether anything could be given back. */
  get hasIdle(): boolean {
    return this.lapsedCount + this.freeSmall.length + this.freeLarge.length > 0
  }

  /** A frame of a whole group, or undefined if small ones have to do. */
  takeGroup(reclaim: boolean): Frame | undefined {
    const { groupColumns } = this
    if (groupColumns === 1) return undefined
    const free = this.freeLarge.pop()
    if (free) return this.use(free)
    if (this.presentColumns + groupColumns <= this.limitColumns) return this.create(groupColumns)
    if (!reclaim) return undefined
    const lapsed = this.lapsed.find(
      ({ state, columns, steps }) =>
        state === 'lapsed' && columns === groupColumns && this.fence.passed(steps),
    )
    if (!lapsed) return undefined
    this.clear(lapsed)
    return this.use(present(this.freeLarge.pop(), 'a cleared frame'))
  }

  /**
   * A frame of one column, or undefined if all are held.
   * @param reclaim also what has lapsed elsewhere; it may have to wait for steps
   */
  takeOne(reclaim: boolean): Frame | undefined {
    for (;;) {
      const free = this.freeSmall.pop()
      if (free) return this.use(free)
      if (this.presentColumns < this.limitColumns) return this.create(1)
      const large = this.freeLarge.pop()
      if (large) this.destroy(large)
      else if (!reclaim || !this.reclaim(true)) return undefined
    }
  }

  /** A frame without memory, since there is none to be had: for one column. */
  takeAbsent(): Frame {
    const frame = this.newFrame(1)
    this.pager.standIn(frame.id)
    this.columns++
    this.absentColumns++
    frame.absent = true
    return frame
  }

  get spareColumns(): number {
    return this.spares.length
  }

  /** Asks for spares until there are so many, unless they are refused. */
  keepSpares(count: number): void {
    for (let i = this.spares.length; i < count; i++) {
      const frame = this.newFrame(1)
      this.pager.create(frame.id, this.pageBytes)
      frame.state = 'spare'
      this.spares.push(frame)
    }
  }

  useSpare(): Frame {
    this.columns++
    return this.use(present(this.spares.pop(), 'a spare'))
  }

  /** A lapsed frame is somebody's again, at the place where it is. */
  revive(frame: Frame): void {
    assert(frame.state === 'lapsed', 'only a lapsed frame is revived')
    frame.state = 'used'
    this.lapsedCount--
  }

  /** Nobody holds the frame any more; the steps queued so far may still touch it. */
  lapse(frame: Frame): void {
    assert(frame.state === 'used' && frame.held === 0, 'only a frame that nobody holds lapses')
    if (frame.absent) {
      // No step has seen it, but what is shared may be on its way there.
      this.fence.wait(this.fence.queued)
      return this.destroyUsed(frame)
    }
    frame.state = 'lapsed'
    frame.steps = this.fence.queued
    this.lapsed.push(frame)
    this.lapsedCount++
    // Revived ones leave holes; now and then they are swept together.
    if (this.lapsed.length > 2 * this.lapsedCount + 64) this.sweep()
  }

  /**
   * Unmaps the frame that lapsed longest ago.
   * @param wait for the steps that could touch it; otherwise only if they are over
   */
  reclaim(wait: boolean): boolean {
    this.sweepHead()
    const frame = this.lapsed[0]
    if (!frame) return false
    if (!this.fence.passed(frame.steps)) {
      if (!wait) return false
      this.fenceWaits++
      this.fence.wait(frame.steps)
    }
    this.clear(frame)
    return true
  }

  /**
   * There was no memory for a frame: it goes, now or when nobody holds it any more.
   * @returns where, with region -1 if nobody has it; undefined of what is no column's, yet or now
   */
  dropAbsent(id: number): KvColumns | undefined {
    const frame = this.frames[id]
    // Another frame had its number when that was said, or it was said of both.
    if (!frame || frame.absent) return undefined
    frame.absent = true
    if (frame.state === 'spare') {
      this.spares.splice(this.spares.indexOf(frame), 1)
      this.forget(frame)
      return undefined
    }
    if (frame.state === 'used') {
      this.absentColumns += frame.columns
      const { region, column: first } = frame
      return { region, first, end: first + frame.columns }
    }
    if (frame.state === 'lapsed') this.evict(frame)
    const list = frame.columns === 1 ? this.freeSmall : this.freeLarge
    list.splice(list.indexOf(frame), 1)
    this.destroy(frame)
    return NOWHERE
  }

  /** Gives a free frame back to the driver. False if there is none. */
  releaseFree(): boolean {
    const frame = this.freeLarge.pop() ?? this.freeSmall.pop()
    if (frame) this.destroy(frame)
    return frame !== undefined
  }

  /** Unmaps a lapsed frame that is in the way of another, after the steps that could touch it. */
  evict(frame: Frame): void {
    assert(frame.state === 'lapsed', 'only a lapsed frame is evicted')
    if (!this.fence.passed(frame.steps)) {
      this.fenceWaits++
      this.fence.wait(frame.steps)
    }
    this.clear(frame)
  }

  /** Gives a frame in use back to the driver; no step may be in flight. */
  destroyUsed(frame: Frame): void {
    assert(frame.state === 'used', 'only a frame in use is destroyed')
    this.unmapAll(frame)
    this.destroy(frame)
  }

  /** Takes a frame from wherever it is mapped; nothing queued may touch it. */
  unmapAll(frame: Frame): void {
    for (const address of frame.views) {
      this.pager.unmap(address, frame.columns * this.pageBytes)
      this.onUnmap(frame, address)
    }
    frame.views.clear()
  }

  private clear(frame: Frame): void {
    this.unmapAll(frame)
    this.lapsedCount--
    frame.state = 'free'
    ;(frame.columns === 1 ? this.freeSmall : this.freeLarge).push(frame)
  }

  private use(frame: Frame): Frame {
    frame.state = 'used'
    frame.held = 0
    return frame
  }

  private create(columns: number): Frame {
    const frame = this.newFrame(columns)
    this.pager.create(frame.id, columns * this.pageBytes)
    this.columns += columns
    return frame
  }

  private newFrame(columns: number): Frame {
    const id = this.spareIds.pop() ?? this.nextId++
    const views = new Set<number>()
    const frame: Frame = {
      id,
      columns,
      state: 'used',
      region: -1,
      column: -1,
      views,
      held: 0,
      steps: 0,
      ticket: 0,
      absent: false,
    }
    this.frames[id] = frame
    return frame
  }

  /** Gives a frame that is mapped nowhere back to the driver. */
  destroy(frame: Frame): void {
    if (frame.absent && frame.state === 'used') this.absentColumns -= frame.columns
    this.columns -= frame.columns
    this.forget(frame)
  }

  private forget(frame: Frame): void {
    this.pager.release(frame.id)
    this.spareIds.push(frame.id)
    this.frames[frame.id] = undefined
    frame.state = 'free'
  }

  /** Gives the spares back, too: there will be no frames any more. */
  close(): void {
    for (const frame of this.spares.splice(0)) this.forget(frame)
  }

  private sweepHead(): void {
    let gone = 0
    while (gone < this.lapsed.length && this.lapsed[gone]?.state !== 'lapsed') gone++
    if (gone > 0) this.lapsed.splice(0, gone)
  }

  private sweep(): void {
    this.lapsed = this.lapsed.filter(({ state }) => state === 'lapsed')
  }
}
