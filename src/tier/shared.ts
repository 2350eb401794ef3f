// Owns the memory that the engine and its pager share: a ring of requests, one of their places, one
// of what is done, and for every column whether it is on its way. A sleeper waits for one of the
// header's words to change.

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
export const PLACES_PUT = 14
export const PLACES_TAKEN = 15
/** 1 once nobody will touch the KV memory any more on a dead pager's behalf. */
export const BURIED = 16
const HEADER_WORDS = 17

/** Values of STATE. A pager that is not running any more never runs again. */
export const RUNNING = 0
export const CLOSED = 1
export const DEAD = 2

/** Values of `moving`, for each column: at rest, being loaded, or the number of its saves. */
export const AT_REST = 0
export const LOADING = 255

export const SAVE = 1
export const LOAD = 2
/** Append to the store's log: `region` and `first` are the address of a block of `end` bytes. */
export const KEEP = 3
export const FORGET = 4

/** How a ticket ended. */
export const DONE_WELL = 0
export const DONE_REFUSED = 1
export const DONE_IO = 2

/** Tickets that may be on their way through a ring. */
const RING_ENTRIES = 1 << 12
const REQUEST_WORDS = 5
const DONE_WORDS = 3
/** Places of requests that the pager has not taken; a request may have half as many. */
const PLACES_MIN = 1 << 14
/** A place's seal: counter (2 words), key, 1 if anything was sealed, tag (4 words). */
export const SEAL_WORDS = 8

export interface TierRequest {
  kind: number
  ticket: number
  region: number
  first: number
  end: number
  places: Uint32Array
}

export class TierShared {
  readonly buffer: SharedArrayBuffer
  readonly geometry: TierGeometry
  readonly header: Int32Array
  /** By region and column. */
  readonly moving: Uint8Array
  /** By slot and column: the region that a registered piece shows, plus one. */
  readonly regionOf: Uint32Array
  readonly seals: Uint32Array
  /** An eventfd. */
  readonly wakeFd: number
  private readonly requests: Int32Array
  private readonly done: Int32Array
  /** Of places. */
  private readonly ring: Uint32Array

  constructor(geometry: TierGeometry, wakeFd: number, buffer?: SharedArrayBuffer) {
    this.wakeFd = wakeFd
    const { slots, regions, columns, capacity } = geometry
    this.geometry = geometry
    const words = {
      header: HEADER_WORDS,
      requests: RING_ENTRIES * REQUEST_WORDS,
      done: RING_ENTRIES * DONE_WORDS,
      // A power of two, so that its counters may wrap.
      places: 2 ** Math.ceil(Math.log2(Math.max(PLACES_MIN, 2 * columns))),
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
    this.ring = new Uint32Array(this.buffer, take(words.places), words.places)
    this.regionOf = new Uint32Array(this.buffer, take(words.regionOf), words.regionOf)
    this.seals = new Uint32Array(this.buffer, take(words.seals), words.seals)
    this.moving = new Uint8Array(this.buffer, take(words.moving), regions * columns)
  }

  /** Asks the pager for something; waits while its rings are full. */
  request({ kind, ticket, region, first, end, places }: TierRequest): void {
    const { header, requests, ring } = this
    assert(places.length <= ring.length / 2, 'the places of a request fit the ring')
    const put = header[REQUESTS_PUT] ?? 0
    const placesPut = header[PLACES_PUT] ?? 0
    for (;;) {
      const taken = Atomics.load(header, REQUESTS_TAKEN)
      const placesHeld = (placesPut - Atomics.load(header, PLACES_TAKEN)) >>> 0
      const fits = placesHeld + places.length <= ring.length
      if (fits && ((put - taken) | 0) < RING_ENTRIES) break
      if (Atomics.load(header, STATE) !== RUNNING) return
      Atomics.wait(header, REQUESTS_TAKEN, taken, WAIT_MS)
    }
    for (let i = 0; i < places.length; i++) {
      ring[((placesPut + i) >>> 0) % ring.length] = places[i] ?? 0
    }
    header[PLACES_PUT] = (placesPut + places.length) | 0
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
    const { header, requests, ring } = this
    const taken = header[REQUESTS_TAKEN] ?? 0
    if (taken === Atomics.load(header, REQUESTS_PUT)) return undefined
    const at = (taken & (RING_ENTRIES - 1)) * REQUEST_WORDS
    const [kind = 0, ticket = 0, region = 0, first = 0, end = 0] = requests.subarray(at)
    const from = header[PLACES_TAKEN] ?? 0
    const places = new Uint32Array(kind === SAVE || kind === LOAD ? end - first : 0)
    for (let i = 0; i < places.length; i++) {
      places[i] = ring[((from + i) >>> 0) % ring.length] ?? 0
    }
    Atomics.store(header, PLACES_TAKEN, (from + places.length) | 0)
    Atomics.store(header, REQUESTS_TAKEN, (taken + 1) | 0)
    Atomics.notify(header, REQUESTS_TAKEN)
    return { kind, ticket, region, first, end, places }
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

  /** Where a column is in `moving`. */
  index(region: number, column: number): number {
    assert(column < this.geometry.columns, `column ${column} exists`)
    return region * this.geometry.columns + column
  }
}

/** How long a sleeper trusts that it will be woken. */
export const WAIT_MS = 100
