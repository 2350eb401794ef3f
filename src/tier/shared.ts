// Owns the memory that the engine and its pager share: a ring of requests, a ring of what is done,
// and for every column whether it is on its way and where it lies on disk. All is atomic 32-bit
// words; a sleeper waits for one of the header's to change.

import { assert } from '../assert.ts'
import { signalEvent } from '../ffi/libc.ts'
import type { KvLayout } from '../kv/layout.ts'

/** What both sides must agree on. Columns are counted within a region, bytes in the KV memory. */
export interface TierGeometry {
  slots: number
  regions: number
  columns: number
  ranges: number
  pageBytes: number
  rangeBytes: number
  slotBytes: number
  /** Places on disk. */
  capacity: number
}

export function tierGeometry(
  layout: KvLayout,
  slots: number,
  regions: number,
  capacity: number,
): TierGeometry {
  const { ranges, rangeBytes, slotBytes } = layout
  const { pageBytes } = layout.shape
  const columns = rangeBytes / pageBytes
  return { slots, regions, columns, ranges, pageBytes, rangeBytes, slotBytes, capacity }
}

/** Bytes of a column; on disk they are one piece. */
export function columnBytes({ ranges, pageBytes }: TierGeometry): number {
  return ranges * pageBytes
}

/** Words of the header. */
export const STATE = 0
export const REQUESTS_PUT = 1
export const REQUESTS_TAKEN = 2
export const DONE_PUT = 3
export const DONE_TAKEN = 4
/** Grows whenever columns have arrived or left. */
export const SETTLED = 5
/** Pieces of slots that are registered with userfaultfd. */
export const REGISTERED = 6
/** The engine wants the pager to end. */
export const CLOSING = 7
/** Counters since the start; they wrap at 2^32. */
export const FAULTS = 8
export const LOADED = 9
export const SAVED = 10
export const LOST = 11
/** Grows with everything that the pager should look at; what it sleeps on when it is idle. */
export const PAGER_WAKE = 12
/** 1 while it sleeps in its ring instead, where only a descriptor reaches it. */
export const IN_RING = 13
const HEADER_WORDS = 16

/** Values of STATE. A pager that is not running any more never runs again. */
export const RUNNING = 0
export const CLOSED = 1
export const DEAD = 2

/** Values of `moving`, for each column. */
export const SETTLED_COLUMN = 0
export const SAVING = 1
export const LOADING = 2

export const SAVE = 1
export const LOAD = 2

/** How a ticket ended. */
export const DONE_WELL = 0
export const DONE_REFUSED = 1
export const DONE_IO = 2

/** Tickets that may be on their way through a ring. */
const RING_ENTRIES = 1 << 12
const REQUEST_WORDS = 5
const DONE_WORDS = 3
/** A place's seal: counter (2 words), key, 1 if anything was sealed, tag (4 words). */
export const SEAL_WORDS = 8

export interface TierRequest {
  kind: number
  ticket: number
  region: number
  first: number
  end: number
}

export class TierShared {
  readonly buffer: SharedArrayBuffer
  readonly geometry: TierGeometry
  readonly header: Int32Array
  /** By region and column. */
  readonly moving: Uint8Array
  readonly places: Uint32Array
  /** By slot and column: the region that a registered piece shows, plus one. */
  readonly regionOf: Uint32Array
  readonly seals: Uint32Array
  /** An eventfd. */
  readonly wakeFd: number
  private readonly requests: Int32Array
  private readonly done: Int32Array

  constructor(geometry: TierGeometry, wakeFd: number, buffer?: SharedArrayBuffer) {
    this.wakeFd = wakeFd
    const { slots, regions, columns, capacity } = geometry
    this.geometry = geometry
    const words = {
      header: HEADER_WORDS,
      requests: RING_ENTRIES * REQUEST_WORDS,
      done: RING_ENTRIES * DONE_WORDS,
      places: regions * columns,
      regionOf: slots * columns,
      seals: capacity * SEAL_WORDS,
      moving: Math.ceil((regions * columns) / 4),
    }
    const total = Object.values(words).reduce((sum, count) => sum + count, 0)
    this.buffer = buffer ?? new SharedArrayBuffer(total * 4)
    let at = 0
    const take = (count: number) => {
      const from = at
      at += count * 4
      return from
    }
    this.header = new Int32Array(this.buffer, take(words.header), words.header)
    this.requests = new Int32Array(this.buffer, take(words.requests), words.requests)
    this.done = new Int32Array(this.buffer, take(words.done), words.done)
    this.places = new Uint32Array(this.buffer, take(words.places), words.places)
    this.regionOf = new Uint32Array(this.buffer, take(words.regionOf), words.regionOf)
    this.seals = new Uint32Array(this.buffer, take(words.seals), words.seals)
    this.moving = new Uint8Array(this.buffer, take(words.moving), regions * columns)
  }

  /** Asks the pager for something; waits while its ring is full. */
  request({ kind, ticket, region, first, end }: TierRequest): void {
    const { header, requests } = this
    const put = header[REQUESTS_PUT] ?? 0
    for (;;) {
      const taken = Atomics.load(header, REQUESTS_TAKEN)
      if (((put - taken) | 0) < RING_ENTRIES || Atomics.load(header, STATE) !== RUNNING) break
      Atomics.wait(header, REQUESTS_TAKEN, taken, WAIT_MS)
    }
    requests.set([kind, ticket, region, first, end], (put & (RING_ENTRIES - 1)) * REQUEST_WORDS)
    Atomics.store(header, REQUESTS_PUT, (put + 1) | 0)
    this.wakePager()
  }

  wakePager(): void {
    Atomics.add(this.header, PAGER_WAKE, 1)
    Atomics.notify(this.header, PAGER_WAKE)
    if (Atomics.load(this.header, IN_RING) === 1) signalEvent(this.wakeFd)
  }

  /** The oldest request that the pager has not taken yet. */
  nextRequest(): TierRequest | undefined {
    const { header, requests } = this
    const taken = header[REQUESTS_TAKEN] ?? 0
    if (taken === Atomics.load(header, REQUESTS_PUT)) return undefined
    const at = (taken & (RING_ENTRIES - 1)) * REQUEST_WORDS
    const word = (i: number) => requests[at + i] ?? 0
    const request = {
      kind: word(0),
      ticket: word(1),
      region: word(2),
      first: word(3),
      end: word(4),
    }
    Atomics.store(header, REQUESTS_TAKEN, (taken + 1) | 0)
    Atomics.notify(header, REQUESTS_TAKEN)
    return request
  }

  /** Tells the engine how a ticket ended; false if its ring is full. */
  finish(ticket: number, outcome: number, errno: number): boolean {
    const { header, done } = this
    const put = header[DONE_PUT] ?? 0
    if (((put - Atomics.load(header, DONE_TAKEN)) | 0) >= RING_ENTRIES) return false
    done.set([ticket, outcome, errno], (put & (RING_ENTRIES - 1)) * DONE_WORDS)
    Atomics.store(header, DONE_PUT, (put + 1) | 0)
    return true
  }

  nextDone(): { ticket: number; outcome: number; errno: number } | undefined {
    const { header, done } = this
    const taken = header[DONE_TAKEN] ?? 0
    if (taken === Atomics.load(header, DONE_PUT)) return undefined
    const at = (taken & (RING_ENTRIES - 1)) * DONE_WORDS
    const ended = {
      ticket: done[at] ?? 0,
      outcome: done[at + 1] ?? 0,
      errno: done[at + 2] ?? 0,
    }
    Atomics.store(header, DONE_TAKEN, (taken + 1) | 0)
    return ended
  }

  /** Columns have arrived or left: whoever waits for that looks again. */
  settle(): void {
    Atomics.add(this.header, SETTLED, 1)
    Atomics.notify(this.header, SETTLED)
  }

  /** Where a column's words are in `moving` and `places`. */
  index(region: number, column: number): number {
    assert(column < this.geometry.columns, `column ${column} exists`)
    return region * this.geometry.columns + column
  }
}

/** How long a sleeper trusts that it will be woken. */
export const WAIT_MS = 100
