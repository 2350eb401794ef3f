// Owns the GPU's KV memory: one range of addresses for each region, and physical frames mapped
// there as tokens come and unmapped when nobody can read them any more. What a sequence shares is
// mapped into its own region too, so every sequence is one contiguous range: no kernel has a table.
//
//   region 0  | f0 f1 f2 f3 .  .  .  . |     its own frames, as far as its tokens go
//   region 5  | f0 f1 f2 g3 g4 .  .  . |     a fork: three frames are region 0's, g3 was copied
//
// After vAttention (Prabhu et al. 2024). The policy (who gets a page) is that of src/kv/; here is
// only where frames are. A backend calls `beforeStep` and `afterStep` around each step.

import { assert, present } from '../../assert.ts'
import type { KvLayout } from '../../kv/layout.ts'
import {
  copiedColumns,
  type KvColumns,
  type KvSpan,
  sharedColumns,
  spannedTokens,
} from '../../kv/regions.ts'
import type { KvTier } from '../../kv/tier.ts'
import type { KvMemory } from '../backend.ts'
import { BoundaryCopies } from './boundary-copies.ts'
import type { CudaDevice } from './device.ts'
import { StepFence } from './fence.ts'
import { type Frame, FramePool } from './frames.ts'
import type { Pager } from './pager.ts'
import { TakeApart } from './take-apart.ts'

export interface CudaKvOptions {
  slots: number
  regions: number
  /** Physical pages at most. */
  limitPages: number
  /** Memory that nobody needed for this long goes back to the driver; Infinity keeps it. */
  idleReleaseMs?: number
}

/** What the memory has done, for metrics and benches. */
export interface CudaKvCounters {
  /** Steps that had to wait for the pager, and how long they did. */
  lateSteps: number
  lateMs: number
  /** Frames that were needed while a step in flight could still touch them. */
  fenceWaits: number
  /** Frames taken apart, since a part of them was needed elsewhere. */
  splits: number
  boundaryCopies: number
}

interface Region {
  /** By column: the region's own frame there. */
  frames: (Frame | undefined)[]
  /** By column: another region's frame that is mapped there. */
  foreign: Map<number, Frame>
  /** Somebody reads what is foreign here. */
  sharing: boolean
  /** By column: 1 if the policy counts it as used. */
  held: Uint8Array
  /** Steps that may read what is foreign here, once nobody shares it any more. */
  steps: number
  /** Steps that may still touch columns of its own which nobody holds any more. */
  leftSteps: number
}

export class CudaKvMemory implements KvMemory {
  readonly layout: KvLayout
  readonly slots: number
  readonly regions: number
  /** Address of region 0. */
  readonly address: number
  readonly fence: StepFence
  readonly contended = this
  readonly inPlace = true
  private readonly device: CudaDevice
  readonly pager: Pager
  /** Where columns go, if anywhere; set by whoever opens it. */
  tier?: KvTier
  private readonly pool: FramePool
  private readonly table: (Region | undefined)[]
  /** By slot: the region where it writes, and reads. */
  private readonly own: Int32Array
  private readonly idleReleaseMs: number
  private readonly reservedBytes: number
  private readonly partly: TakeApart
  private readonly copies: BoundaryCopies
  /** Regions that show others' frames which nobody reads there any more, longest first. */
  private readonly stale: number[] = []
  /** Of the pager: what the next step needs. */
  private needed = 0
  private readonly counted = { lateSteps: 0, lateMs: 0, splits: 0 }
  private idleSinceMs = -Infinity
  private idleSteps = -1
  /** Columns whose memory was refused, since somebody asked. */
  private refused: KvColumns[] = []
  private readonly stream: number
  /** Where steps are queued. */
  private lastStream: number

  constructor(device: CudaDevice, layout: KvLayout, pager: Pager, options: CudaKvOptions) {
    assert(layout.ranges === 1, "the GPU's layout has all layers in one range")
    this.device = device
    this.layout = layout
    this.pager = pager
    this.slots = options.slots
    this.regions = options.regions
    this.idleReleaseMs = options.idleReleaseMs ?? Infinity
    const { driver } = device
    const { pageBytes } = layout.shape
    this.reservedBytes = layout.slotBytes * options.regions
    this.address = driver.reserve(this.reservedBytes)
    this.fence = new StepFence(driver)
    this.copies = new BoundaryCopies(driver)
    const groupColumns = layout.shareColumns
    const shape = { pageBytes, groupColumns, limitColumns: options.limitPages }
    this.pool = new FramePool(pager, this.fence, shape, (frame, at) => this.forget(frame, at))
    this.table = Array.from({ length: options.regions }, () => undefined)
    this.own = Int32Array.from({ length: options.slots }, (_, slot) => slot)
    this.stream = driver.createStream()
    this.lastStream = this.stream
    this.partly = new TakeApart(device, pager, this.pool)
  }

  get counters(): CudaKvCounters {
    const { counted, copies, pool } = this
    return { ...counted, boundaryCopies: copies.count, fenceWaits: pool.fenceWaits }
  }

  /** Where a slot's sequence lies: address(token 0) now, until the slot is mapped anew. */
  slotAddress(slot: number): number {
    return this.address + this.regionOf(slot) * this.layout.slotBytes
  }

  /** Address is `address` + region × slotBytes: for kernels that take an index. */
  regionOf(slot: number): number {
    return present(this.own[slot], 'a slot')
  }

  map(slot: number, region: number, shared: readonly KvSpan[]): void {
    this.own[slot] = region
    const into = this.region(region)
    if (into.sharing) into.steps = this.fence.queued
    this.dropForeign(region)
    into.sharing = shared.length > 0
    for (const part of sharedColumns(this.layout, shared)) {
      for (let c = part.first; c < part.end;) {
        const frame = present(this.region(part.region).frames[c], 'a frame that is shared')
        assert(frame.column === c && c + frame.columns <= part.end, 'frames are shared whole')
        this.evictOwn(region, c, c + frame.columns)
        const address = this.columnAddress(region, c)
        this.pager.map(address, frame.columns * this.layout.shape.pageBytes, frame.id)
        frame.views.add(address)
        for (let i = 0; i < frame.columns; i++) into.foreign.set(c + i, frame)
        c += frame.columns
        // The frame may have been mapped in its own region just now, and not be there yet.
        this.needed = this.pager.ticket
      }
    }
  }

  /** Queued before the next step, when all of it is there. */
  copy(slot: number, first: number, shared: readonly KvSpan[]): void {
    const { pageBytes } = this.layout.shape
    const region = this.regionOf(slot)
    const all = spannedTokens(shared) * this.layout.tokenStride
    for (const part of copiedColumns(this.layout, shared, first)) {
      const bytes = Math.min(part.end * pageBytes, all) - part.first * pageBytes
      const from = this.columnAddress(part.region, part.first)
      this.copies.add(this.columnAddress(region, part.first), from, bytes)
    }
  }

  grow(region: number, first: number, end: number): void {
    const { frames, held } = this.region(region)
    for (let c = first; c < end; c++) {
      const frame = frames[c] ?? this.place(region, c, end, true)
      assert(frame && held[c] === 0, `column ${c} of region ${region} can be had`)
      if (frame.state === 'lapsed') this.pool.revive(frame)
      held[c] = 1
      frame.held++
      this.partly.note(frame)
      if (frame.ticket > this.needed) this.needed = frame.ticket
    }
  }

  expect(region: number, first: number, end: number): void {
    const { frames, foreign } = this.region(region)
    for (let c = first; c < end; c++) {
      if (frames[c] || foreign.has(c)) continue
      const frame = this.place(region, c, end, false)
      if (!frame) return
      // Nobody's yet: it is there if it comes to be needed, and to be had if it does not.
      this.pool.lapse(frame)
    }
  }

  unshare(region: number): void {
    const left = this.region(region)
    left.sharing = false
    left.steps = this.fence.queued
    this.stale.push(region)
  }

  discard(region: number, first: number, end: number): void {
    this.copies.drop(this.columnAddress(region, first), this.columnAddress(region, end))
    this.finishCopies(region, first, end)
    const left = this.region(region)
    const { frames, held } = left
    left.leftSteps = this.fence.queued
    for (let c = first; c < Math.min(end, frames.length); c++) {
      const frame = frames[c]
      if (!frame || held[c] !== 1) continue
      held[c] = 0
      frame.held--
      this.partly.note(frame)
      if (frame.held === 0) this.pool.lapse(frame)
    }
  }

  /** What is queued on `stream` from now on finds columns as the steps queued so far leave them. */
  beforeSave({ region, first, end }: KvColumns, stream: number): void {
    this.finishCopies(region, first, end)
    this.fence.holdBack(stream, this.fence.queued)
  }

  /** What is queued on `stream` from now on may write to columns: whoever had them does not. */
  beforeLoad({ region }: KvColumns, stream: number): void {
    this.fence.holdBack(stream, this.region(region).leftSteps)
  }

  columnAddress(region: number, column: number): number {
    const { slotBytes, shape } = this.layout
    return this.address + region * slotBytes + column * shape.pageBytes
  }

  /** Makes sure that all pages of the step are there; queues copies that it reads from. */
  beforeStep(stream: number): void {
    this.awaitNeeded()
    this.lastStream = stream
    this.copies.queue(stream)
  }

  private awaitNeeded(): void {
    if (this.pager.done < this.needed) {
      const start = performance.now()
      this.pager.wait(this.needed)
      this.counted.lateSteps++
      this.counted.lateMs += performance.now() - start
    } else this.pager.wait(this.needed)
  }

  lacking(): readonly KvColumns[] {
    this.awaitNeeded()
    this.hearRefusals()
    return this.refused.length === 0 ? NONE : this.refused.splice(0)
  }

  obtainablePages(more: number): number {
    const { pageBytes } = this.layout.shape
    const { presentColumns } = this.pool
    if (more === 0) return presentColumns
    const freeBytes = this.device.driver.memoryInfo().freeBytes - LEFT_FREE_BYTES
    return presentColumns + Math.min(more, Math.max(0, Math.floor(freeBytes / pageBytes)))
  }

  limit(pages: number): void {
    this.pool.limitColumns = pages
  }

  /** The step is queued on the stream: what it may touch stays until it is over. */
  afterStep(stream: number): void {
    this.fence.record(stream)
    // While the step computes, regions are cleared for their next owner.
    while (this.stale.length > 0) {
      const region = present(this.stale[0], 'a region')
      if (!this.fence.passed(this.region(region).steps)) break
      this.stale.shift()
      if (!this.region(region).sharing) this.dropForeign(region)
    }
  }

  /**
   * Gives memory that was idle for a while back to the driver, a little at each call.
   * @returns milliseconds until there may be more to do, undefined if there is nothing
   */
  settle(nowMs: number): number | undefined {
    if (this.idleReleaseMs === Infinity || !this.pool.hasIdle) return undefined
    if (this.fence.queued !== this.idleSteps) {
      this.idleSteps = this.fence.queued
      this.idleSinceMs = nowMs
    }
    const leftMs = this.idleSinceMs + this.idleReleaseMs - nowMs
    if (leftMs > 0) return leftMs
    // Whoever comes now waits for what the pager has been told, so it is told little at a time.
    if (this.pager.ticket - this.pager.done > SETTLE_FRAMES) return 1
    for (let i = 0; i < SETTLE_FRAMES; i++) {
      // Nothing can go, yet something is idle: a step that may touch it is still under way.
      if (!this.pool.reclaim(false) && !this.pool.releaseFree()) return i > 0 ? 0 : 1
      if (!this.pool.hasIdle) return undefined
    }
    return 0
  }

  /** Waits until the driver has done all that was decided. */
  drain(): void {
    this.pager.wait(this.pager.ticket)
  }

  residentBytes(): number {
    return this.pool.residentBytes
  }

  /** Throws if the account of frames contradicts itself. */
  check(): void {
    let columns = 0
    this.table.forEach((region, index) => {
      region?.frames.forEach((frame, c) => {
        if (!frame) return
        columns++
        assert(frame.region === index && frame.state !== 'free', 'a frame is where it belongs')
        assert(c >= frame.column && c < frame.column + frame.columns, 'a frame has its columns')
        assert(frame.state === 'used' || region.held[c] === 0, 'what is held is in use')
      })
    })
    assert(columns <= this.pool.columns, 'frames in regions are frames of the pool')
    assert(this.pool.presentColumns <= this.pool.limitColumns, 'memory keeps to its limit')
  }

  close(): void {
    this.tier?.close()
    this.fence.wait(this.fence.queued)
    for (const region of this.table) {
      for (const frame of new Set(region?.frames)) {
        if (frame?.state === 'used') this.pool.destroyUsed(frame)
      }
    }
    while (this.pool.reclaim(true));
    while (this.pool.releaseFree());
    this.pool.close()
    this.pager.close()
    const { driver } = this.device
    driver.freeReservation(this.address, this.reservedBytes)
    this.partly.close()
    driver.destroyStream(this.stream)
    this.fence.close()
  }

  /** Maps a new frame at a column, of a whole group if all of it is wanted. */
  private place(region: number, c: number, end: number, reclaim: boolean): Frame | undefined {
    const { frames } = this.region(region)
    const group = this.layout.shareColumns
    const whole = c % group === 0 && c + group <= end && !hasAny(frames, c, c + group)
    let frame = whole ? this.pool.takeGroup(reclaim) : undefined
    frame ??= this.pool.takeOne(reclaim)
    if (!reclaim) return frame && this.show(frame, region, c)
    while (!frame && this.splitOne()) frame = this.pool.takeOne(true)
    return this.show(frame ?? this.takeAbsent(region, c), region, c)
  }

  /** What memory there is cannot be taken apart: whoever wants more goes without. */
  private takeAbsent(region: number, first: number): Frame {
    this.refused.push({ region, first, end: first + 1 })
    return this.pool.takeAbsent()
  }

  /** Maps a frame at a column of the region that it belongs to from now on. */
  private show(frame: Frame, region: number, column: number): Frame {
    const { frames } = this.region(region)
    this.dropForeignAt(region, column, column + frame.columns)
    frame.region = region
    frame.column = column
    const address = this.columnAddress(region, column)
    this.pager.map(address, frame.columns * this.layout.shape.pageBytes, frame.id)
    frame.ticket = this.pager.ticket
    frame.views.add(address)
    for (let i = 0; i < frame.columns; i++) frames[column + i] = frame
    return frame
  }

  private hearRefusals(): void {
    for (const frame of this.pager.takeAbsent()) {
      const columns = this.pool.dropAbsent(frame)
      if (columns) this.refused.push(columns)
    }
  }

  /** Queues what is to be copied from or to columns now, if anything is. */
  private finishCopies(region: number, first: number, end: number): void {
    const [from, to] = [this.columnAddress(region, first), this.columnAddress(region, end)]
    if (!this.copies.touch(from, to)) return
    this.pager.wait(this.needed)
    this.copies.queue(this.lastStream)
    this.fence.record(this.lastStream)
  }

  private dropForeign(region: number): void {
    this.dropForeignAt(region, 0, Infinity)
  }

  /** Unmaps what others' frames a region still shows, which nobody reads any more. */
  private dropForeignAt(region: number, first: number, end: number): void {
    const { foreign, steps } = this.region(region)
    if (foreign.size === 0) return
    for (const [c, frame] of foreign) {
      if (c < first || c >= end || !foreign.has(c)) continue
      if (!this.fence.passed(steps)) {
        this.pool.fenceWaits++
        this.fence.wait(steps)
      }
      const address = this.columnAddress(region, frame.column)
      this.pager.unmap(address, frame.columns * this.layout.shape.pageBytes)
      frame.views.delete(address)
      this.forget(frame, address)
    }
  }

  /** Frees the place of lapsed frames of a region's own, where another's are about to be mapped. */
  private evictOwn(region: number, first: number, end: number): void {
    const { frames } = this.region(region)
    for (let c = first; c < end; c++) {
      const frame = frames[c]
      if (frame) this.pool.evict(frame)
    }
  }

  /** A view of a frame has gone: of its own region, then it is nowhere; or of another. */
  private forget(frame: Frame, address: number): void {
    const { slotBytes, shape } = this.layout
    const region = Math.floor((address - this.address) / slotBytes)
    const first = (address - this.address - region * slotBytes) / shape.pageBytes
    const { frames, foreign } = this.region(region)
    for (let c = first; c < first + frame.columns; c++) {
      if (frames[c] === frame) frames[c] = undefined
      else foreign.delete(c)
    }
  }

  /** @returns false if there is none, or too little to do it with */
  private splitOne(): boolean {
    const { pager, partly } = this
    partly.keepSpares()
    pager.wait(pager.ticket)
    this.hearRefusals()
    const frame = partly.find()
    if (!frame) return false
    const { region, column, columns } = frame
    const held: number[] = []
    for (let i = 0; i < columns; i++) if (this.region(region).held[column + i] === 1) held.push(i)
    const address = this.columnAddress(region, column)
    partly.split(frame, address, held, (small, i) => this.show(small, region, column + i))
    this.fence.wait(this.fence.queued)
    this.counted.splits++
    return true
  }

  private region(index: number): Region {
    assert(index >= 0 && index < this.regions, `region ${index} exists`)
    return (this.table[index] ??= {
      frames: [],
      foreign: new Map(),
      sharing: false,
      held: new Uint8Array(this.layout.rangeBytes / this.layout.shape.pageBytes),
      steps: 0,
      leftSteps: 0,
    })
  }
}

const NONE: readonly KvColumns[] = []

/** The driver and the libraries need some now and then. */
const LEFT_FREE_BYTES = 64 << 20

/** Frames whose unmapping or release the pager is told at a time: 2 ms of its work. */
const SETTLE_FRAMES = 64

function hasAny(frames: readonly (Frame | undefined)[], first: number, end: number): boolean {
  for (let c = first; c < end; c++) if (frames[c]) return true
  return false
}
