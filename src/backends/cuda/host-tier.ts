// Owns the tier of a GPU's KV: columns go to pinned memory of the host, and what was unused longest
// goes on to a disk, if there is one (src/kv/levels.ts decides). The engine only queues: copies run
// on streams of their own, are given to the driver by the pager's thread, and end when an event has
// passed. So no step waits for one, and a sequence runs when all of it is there.
//
//   GPU ──out stream, after the steps that wrote it──▶ frame ──disk tier──▶ place
//   GPU ◀──in stream, after who had its columns────── frame ◀──disk tier── place

import { assert, present } from '../../assert.ts'
import type { LatticeError } from '../../errors.ts'
import type { KvLayout } from '../../kv/layout.ts'
import { Levels, type Spill } from '../../kv/levels.ts'
import type { KvColumns } from '../../kv/regions.ts'
import type { EndedTicket, KvTier, TierLevels } from '../../kv/tier.ts'
import type { CudaDevice } from './device.ts'
import { HostPages } from './host-pages.ts'
import type { Pager } from './pager.ts'

/** A longer copy would hold up others' for more than 0.6 ms. */
const COPY_BYTES_MAX = 32 << 20

/** Columns that go to the disk, or come from it, in one ticket. */
const DISK_COLUMNS = 16
/** Under way to the disk at once. */
const SPILLS_MAX = 64

/** Of PCIe 4 × 16 or better, until it was measured: 25 GB/s. */
const GUESS = { save: 1 / 25e6, load: 1 / 25e6 }

/** The GPU's memory, as the tier needs it. */
export interface TierSource {
  readonly layout: KvLayout
  readonly pager: Pager
  columnAddress(region: number, column: number): number
  /** What is queued on a stream from now on reads columns as queued steps leave them. */
  beforeSave(columns: KvColumns, stream: number): void
  /** What is queued on a stream from now on may write to columns. */
  beforeLoad(columns: KvColumns, stream: number): void
}

export interface HostTierOptions {
  frames: number
  /** Opens what is beneath, over the same pages, which are columns of its only region. */
  below?: (pages: HostPages) => KvTier
}

/** A ticket that has not ended. */
interface Job {
  ticket: number
  kind: 'save' | 'load'
  columns: KvColumns
  places: Uint32Array
  /** Columns that are queued, of a save. */
  next: number
  /** Columns that are not there yet. */
  left: number
  /** Columns that came from the disk. */
  below: number
  start: number
  error: LatticeError | undefined
}

/** Copies that an event ends. */
interface Flight {
  event: number
  /** Of the pager: the event is recorded when it has got there. */
  ticket: number
  onEnd(event: number): void
}

/** Columns of a load that come from the disk, by their index in it. */
interface Fetch {
  job: Job
  indexes: number[]
}

export class HostTier implements KvTier {
  readonly capacity: number
  readonly guess = GUESS
  readonly path?: string
  readonly pages: HostPages
  /** What lies where: for tests, too. */
  readonly places: Levels
  private readonly device: CudaDevice
  private readonly source: TierSource
  private readonly below: KvTier | undefined
  private readonly streams: Readonly<Record<Job['kind'], number>>
  private readonly flights: Readonly<Record<Job['kind'], Flight[]>> = { save: [], load: [] }
  private readonly events: number[] = []
  private readonly spareEvents: number[] = []
  /** Saves that have no frames for all of their columns yet. */
  private readonly saves: Job[] = []
  private readonly fetches: Fetch[] = []
  /** Of the disk: told what has become of a ticket. */
  private readonly diskTickets = new Map<number, (error: LatticeError | undefined) => void>()
  private spilling = 0
  private spilled = 0
  private ended: EndedTicket[] = []
  private nextTicket = 1
  private closed = false

  /** @throws LatticeError `gpu_call_failed` if memory cannot be pinned, and what `below` throws */
  constructor(device: CudaDevice, source: TierSource, { frames, below }: HostTierOptions) {
    assert(source.layout.ranges === 1, 'a column is a page')
    this.device = device
    this.source = source
    this.pages = new HostPages(device.driver, frames, source.layout.shape.pageBytes)
    try {
      this.below = below?.(this.pages)
    } catch (thrown) {
      this.pages.close()
      throw thrown
    }
    if (this.below?.path !== undefined) this.path = this.below.path
    this.places = new Levels(frames, this.below?.capacity ?? 0)
    this.capacity = this.places.capacity
    const { driver } = device
    this.streams = { save: driver.createStream(), load: driver.createStream() }
  }

  get levels(): TierLevels {
    const { pages, places, below } = this
    const { pageBytes } = pages
    return {
      hostBytes: pages.bytes,
      hostUsedBytes: places.usedFrames * pageBytes,
      diskBytes: (below?.capacity ?? 0) * pageBytes,
      diskUsedBytes: places.usedBelow * pageBytes,
      spilledBytes: this.spilled * pageBytes,
    }
  }

  isBelow(place: number): boolean {
    return this.places.isBelow(place)
  }

  forget(place: number): void {
    this.places.forget(place)
  }

  save(columns: KvColumns, places: Uint32Array): number {
    const job = this.newJob('save', columns, places)
    this.source.beforeSave(columns, this.streams.save)
    this.saves.push(job)
    this.pump()
    return job.ticket
  }

  load(columns: KvColumns, places: Uint32Array): number {
    const job = this.newJob('load', columns, places)
    this.source.beforeLoad(columns, this.streams.load)
    const here: number[] = []
    const indexes: number[] = []
    places.forEach((place, i) => (this.isBelow(place) ? indexes : here).push(i))
    job.below = indexes.length
    if (here.length > 0) {
      const read = here.map((i) => present(places[i], 'a place'))
      for (const place of read) this.places.pin(place)
      const frames = read.map((place) => this.places.frameOf(place))
      this.copy(job, here, frames, () => {
        for (const place of read) this.places.unpin(place)
      })
    }
    if (indexes.length > 0) this.fetches.push({ job, indexes })
    this.pump()
    return job.ticket
  }

  poll(): readonly EndedTicket[] {
    for (const { ticket, error } of this.below?.poll() ?? []) {
      const told = present(this.diskTickets.get(ticket), 'a ticket of the disk')
      this.diskTickets.delete(ticket)
      told(error)
    }
    for (const flights of Object.values(this.flights)) this.land(flights)
    this.pump()
    const { ended } = this
    this.ended = []
    return ended
  }

  check(): void {
    this.below?.check()
    // Throws what the pager's thread has thrown.
    this.source.pager.wait(0)
  }

  /** What is under way ends first. */
  close(): void {
    if (this.closed) return
    this.closed = true
    const { driver } = this.device
    this.source.pager.wait(this.source.pager.ticket)
    for (const stream of Object.values(this.streams)) driver.destroyStream(stream)
    for (const event of this.events) driver.destroyEvent(event)
    this.below?.close()
    this.pages.close()
  }

  private newJob(kind: Job['kind'], columns: KvColumns, places: Uint32Array): Job {
    const { length } = places
    assert(length > 0 && columns.end - columns.first === length, 'each column has a place')
    const start = { ticket: this.nextTicket++, next: 0, left: length, below: 0, start: -1 }
    return { kind, columns, places: places.slice(), error: undefined, ...start }
  }

  private pump(): void {
    this.pumpSaves()
    this.pumpSpills()
    this.pumpFetches()
  }

  /** Gives frames to those who wait for them, in their order. */
  private pumpSaves(): void {
    for (let job = this.saves[0]; job; job = this.saves[0]) {
      const count = Math.min(job.places.length - job.next, this.places.room)
      if (count === 0) return
      const places = job.places.subarray(job.next, job.next + count)
      const frames = this.places.fill(places)
      const first = job.next
      job.next += count
      const indexes = Array.from(places, (_, i) => first + i)
      this.copy(job, indexes, frames, () => this.places.filled(places))
      if (job.next === job.places.length) this.saves.shift()
    }
  }

  /** Begins to empty frames before somebody waits for one. */
  private pumpSpills(): void {
    const { below } = this
    if (!below) return
    const wanted = Math.min(this.places.short, SPILLS_MAX - this.spilling)
    if (wanted <= 0) return
    const spills = this.places.spill(wanted).toSorted((a, b) => a.frame - b.frame)
    for (const run of runs(spills, ({ frame }) => frame)) {
      const first = present(run[0], 'a spill').frame
      const columns = { region: 0, first, end: first + run.length }
      const ticket = below.save(
        columns,
        Uint32Array.from(run, (spill) => spill.below),
      )
      this.spilling += run.length
      this.diskTickets.set(ticket, (error) => this.endSpills(run, error))
    }
  }

  private endSpills(spills: readonly Spill[], error: LatticeError | undefined): void {
    this.spilling -= spills.length
    if (!error) this.spilled += spills.length
    for (const spill of spills) this.places.spilled(spill, error !== undefined)
    if (!error) return
    // Nothing can be emptied: whoever waits for that is told, and has no room here.
    for (const job of this.saves.splice(0, Infinity)) {
      job.error = error
      this.arrived(job, job.places.length - job.next, -1)
    }
  }

  private pumpFetches(): void {
    for (let fetch = this.fetches[0]; fetch; fetch = this.fetches[0]) {
      const { job, indexes } = fetch
      const frames = this.places.stage(Math.min(indexes.length, DISK_COLUMNS))
      if (!frames) return
      let at = 0
      for (const run of runs([...frames], (frame) => frame)) {
        this.fetch(job, indexes.slice(at, at + run.length), Uint32Array.from(run))
        at += run.length
      }
      indexes.splice(0, frames.length)
      if (indexes.length === 0) this.fetches.shift()
    }
  }

  /** Brings columns of a load from the disk into frames that follow each other, and on. */
  private fetch(job: Job, indexes: readonly number[], frames: Uint32Array): void {
    const first = present(frames[0], 'a frame')
    const below = Uint32Array.from(indexes, (i) => {
      return this.places.belowOf(present(job.places[i], 'a place'))
    })
    const columns = { region: 0, first, end: first + frames.length }
    const ticket = present(this.below, 'a disk').load(columns, below)
    this.diskTickets.set(ticket, (error) => {
      if (!error) return this.copy(job, indexes, frames, () => this.endFetch(job, indexes, frames))
      job.error ??= error
      this.places.giveStage(frames)
      this.arrived(job, indexes.length, -1)
    })
  }

  private endFetch(job: Job, indexes: readonly number[], frames: Uint32Array): void {
    indexes.forEach((index, i) => {
      const place = present(job.places[index], 'a place')
      this.places.unstage(place, present(frames[i], 'a frame'))
    })
  }

  /** Queues copies between columns, given by their index in a job, and frames. */
  private copy(
    job: Job,
    indexes: readonly number[],
    frames: ArrayLike<number>,
    onEnd: () => void,
  ): void {
    const { source, pages, device } = this
    const { pager } = source
    const { pageBytes } = pages
    const stream = this.streams[job.kind]
    if (job.start < 0) pager.record((job.start = this.takeEvent()), stream)
    const most = Math.max(1, Math.floor(COPY_BYTES_MAX / pageBytes))
    for (let i = 0; i < indexes.length;) {
      const index = present(indexes[i], 'a column')
      const frame = present(frames[i], 'a frame')
      let run = 1
      while (run < most && indexes[i + run] === index + run && frames[i + run] === frame + run)
        run++
      const gpu = source.columnAddress(job.columns.region, job.columns.first + index)
      const host = pages.address + frame * pageBytes
      if (job.kind === 'save') pager.copyToHost(host, gpu, run * pageBytes, stream)
      else pager.copyToGpu(gpu, host, run * pageBytes, stream)
      i += run
    }
    const event = this.takeEvent()
    pager.record(event, stream)
    this.flights[job.kind].push({
      event,
      ticket: pager.ticket,
      onEnd: (ended) => {
        onEnd()
        this.arrived(job, indexes.length, device.driver.elapsedMs(job.start, ended))
      },
    })
  }

  private land(flights: Flight[]): void {
    const { pager } = this.source
    const { driver } = this.device
    while (flights[0] && pager.done >= flights[0].ticket && driver.eventDone(flights[0].event)) {
      const { event, onEnd } = present(flights.shift(), 'a flight')
      onEnd(event)
      this.spareEvents.push(event)
    }
  }

  /** @param ms since its first copy began; -1 if that is not known */
  private arrived(job: Job, columns: number, ms: number): void {
    job.left -= columns
    if (job.left > 0) return
    if (job.start >= 0) this.spareEvents.push(job.start)
    const { ticket, error, below } = job
    // What came from the disk took longer than its copies.
    this.ended.push({ ticket, error, below, ...(ms >= 0 && below === 0 && { ms }) })
  }

  private takeEvent(): number {
    const spare = this.spareEvents.pop()
    if (spare !== undefined) return spare
    const event = this.device.driver.createEvent(true)
    this.events.push(event)
    return event
  }
}

/** Cuts a sorted list where the next number is not one more. */
function runs<T>(list: readonly T[], numberOf: (item: T) => number): T[][] {
  const cut: T[][] = []
  let before = NaN
  for (const item of list) {
    if (numberOf(item) !== before + 1 || present(cut.at(-1), 'a run').length === DISK_COLUMNS) {
      cut.push([])
    }
    present(cut.at(-1), 'a run').push(item)
    before = numberOf(item)
  }
  return cut
}
