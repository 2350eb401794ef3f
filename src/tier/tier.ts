// Owns the engine's side of the tier: columns are handed to the pager, and slots that show columns
// which are still on their way are registered with userfaultfd, so that whoever touches one waits.
//
// A page is registered only while its column is being loaded: everything else keeps the kernel's
// own zero pages at first touch. A column must be at rest to be copied or given back.

import { assert } from '../assert.ts'
import { LatticeError } from '../errors.ts'
import { closeFd, createEvent, errnoName } from '../ffi/libc.ts'
import { Uring } from '../ffi/uring.ts'
import {
  type FaultDescriptor,
  openFaults,
  registerFaults,
  unregisterFaults,
} from '../ffi/userfaultfd.ts'
import type { KvLayout } from '../kv/layout.ts'
import type { KvColumns } from '../kv/regions.ts'
import type { KvTier } from '../kv/tier.ts'
import { Keys } from './keys.ts'
import type { PagerFault, PagerStart } from './pager.ts'
import { type PlaceFile, temporaryPlaces } from './place-file.ts'
import { type OpenedStore, openStore, type StoreOptions } from './store/open.ts'
import { DiskStore } from './store/store.ts'
import * as words from './shared.ts'
import { columnBytes, type TierGeometry, tierGeometry, TierShared } from './shared.ts'

/** A main thread that is this late does not come any more. */
const LAST_RITES_MS_MAX = 5_000

export interface OffloadOptions {
  bytes: number
  /** The directory of the file; /var/tmp unless given. */
  path?: string
  /** Grows whenever the engine should look; see the engine's thread. */
  signal: SharedArrayBuffer
  /** Starts the pager's thread and watches it (src/tier/pager-host.ts). */
  startPager: (start: PagerStart) => void
  /** false: as where userfaultfd is not allowed; for tests. */
  faults?: boolean
  /** Keeps what it is asked to keep beyond the process; the file then lies in its directory. */
  store?: StoreOptions
  /** For tests. */
  pagerFault?: PagerFault
}

/** The KV memory that is kept beneath. */
export interface TieredMemory {
  readonly layout: KvLayout
  readonly slots: number
  readonly regions: number
  readonly address: number
  readonly fd: number
}

/** Columns of a slot that are registered until a ticket ends. */
interface Registered {
  slot: number
  first: number
  end: number
}

interface Load {
  columns: KvColumns
  registered: Registered[]
}

/** What a person should know of it. */
export interface TierFacts {
  bytes: number
  file: Omit<PlaceFile, 'fd'>
  touches: FaultDescriptor['answers'] | 'none'
  store?: StoreFacts
}

/** What a store had when it was opened. */
export interface StoreFacts {
  directory: string
  prefixes: number
  tokens: number
  /** Records and prefixes that were torn or changed, or built on one that was. */
  lost: number
  /** Prefixes that were left out, since the store was larger when they were written. */
  beyond: number
}

export interface TierStats {
  capacity: number
  /** Touches of absent pages. */
  faults: number
  /** Columns, since the start. */
  saved: number
  loaded: number
  /** Columns that did not come back as they went. */
  lost: number
}

export class DiskTier implements KvTier {
  readonly capacity: number
  readonly path: string
  readonly file: PlaceFile
  readonly columnBytes: number
  readonly facts: TierFacts
  readonly store?: DiskStore
  private readonly memory: TieredMemory
  private readonly shared: TierShared
  private readonly keys: Keys
  private readonly faultFd: number
  private readonly loads = new Map<number, Load>()
  /** By slot: what it shows. */
  private readonly shown: KvColumns[][]
  private nextTicket = 1
  /** Tickets that have not ended. */
  private running = 0
  private closed = false

  /** @throws LatticeError `usage` if not one column fits, and what the file and io_uring throw */
  constructor(memory: TieredMemory, options: OffloadOptions) {
    const geometry = geometryFor(memory, options.bytes)
    this.memory = memory
    this.capacity = geometry.capacity
    this.columnBytes = columnBytes(geometry)
    // Where io_uring is forbidden the engine should not even start.
    new Uring(1).close()
    this.keys = new Keys()
    const { columnBytes: bytes, capacity } = this
    const { store } = options
    const opened = store && openStore(store, this.keys, capacity, bytes)
    this.file = opened?.columns ?? temporaryPlaces(capacity * bytes, options.path)
    this.path = this.file.path
    this.shared = new TierShared(geometry, createEvent())
    if (opened) this.store = new DiskStore(opened, this.shared, () => this.newTicket())
    const faults = options.faults === false ? undefined : openFaults()
    this.faultFd = faults?.fd ?? -1
    this.facts = {
      bytes: this.capacity * this.columnBytes,
      file: this.file,
      touches: faults?.answers ?? 'none',
      ...(opened && { store: storeFacts(opened) }),
    }
    const columns = { first: 0, end: geometry.columns }
    this.shown = Array.from({ length: memory.slots }, (_, slot) => [{ region: slot, ...columns }])
    const current = opened ? opened.keys.columnKey(opened.keys.salt) : this.keys.random()
    options.startPager({
      shared: this.shared.buffer,
      geometry,
      memoryFd: memory.fd,
      slotsAddress: memory.address,
      faultFd: this.faultFd,
      fileFd: this.file.fd,
      wakeFd: this.shared.wakeFd,
      keys: {
        addresses: this.keys.addresses,
        current,
        fileId: opened?.keys.storeId ?? new Uint8Array(16),
      },
      ...(opened && { log: opened.log }),
      signal: options.signal,
      ...(options.pagerFault && { fault: options.pagerFault }),
    })
  }

  /** A place must not be in two tickets at once. */
  save(columns: KvColumns, places: Uint32Array): number {
    return this.request(words.SAVE, columns, places)
  }

  load(columns: KvColumns, places: Uint32Array): number {
    const ticket = this.request(words.LOAD, columns, places)
    const load: Load = { columns, registered: [] }
    this.loads.set(ticket, load)
    for (let slot = 0; slot < this.shown.length; slot++) this.guard(slot, load)
    return ticket
  }

  poll(): readonly { ticket: number; error: LatticeError | undefined }[] {
    const ended: { ticket: number; error: LatticeError | undefined }[] = []
    for (let done = this.shared.nextDone(); done; done = this.shared.nextDone()) {
      const { ticket, outcome, errno } = done
      const load = this.loads.get(ticket)
      ended.push({ ticket, error: outcome === words.DONE_WELL ? undefined : lost(load, errno) })
      // A ticket that failed is told of before the rest of it has arrived.
      if (load) this.settle(load.columns)
      for (const piece of load?.registered ?? []) this.unregister(piece)
      this.loads.delete(ticket)
      this.running--
    }
    return ended
  }

  check(): void {
    if (Atomics.load(this.shared.header, words.STATE) === words.DEAD) throw pagerFailed()
  }

  /** What slot `slot` shows from now on, in place of what it showed. */
  show(slot: number, region: number, shared: readonly KvColumns[]): void {
    const { columns } = this.shared.geometry
    const shown: KvColumns[] = []
    let at = 0
    for (const part of shared) {
      if (part.first > at) shown.push({ region, first: at, end: part.first })
      shown.push(part)
      at = part.end
    }
    if (at < columns) shown.push({ region, first: at, end: columns })
    this.shown[slot] = shown
    for (const load of this.loads.values()) this.guard(slot, load)
  }

  /** A mapping is about to be replaced, and with it all that is registered there. */
  forget(slot: number): void {
    for (const load of this.loads.values()) {
      for (const piece of load.registered) if (piece.slot === slot) this.release(piece)
      load.registered = load.registered.filter((piece) => piece.slot !== slot)
    }
    this.shown[slot] = []
  }

  /** Waits until none of these columns is on its way. */
  settle({ region, first, end }: KvColumns): void {
    if (this.running === 0) return
    const { header, moving } = this.shared
    for (let column = first; column < end; column++) {
      const index = this.shared.index(region, column)
      for (;;) {
        const seen = Atomics.load(header, words.SETTLED)
        if (Atomics.load(moving, index) === words.AT_REST) break
        this.check()
        Atomics.wait(header, words.SETTLED, seen, words.WAIT_MS)
      }
    }
  }

  get faults(): number {
    return Atomics.load(this.shared.header, words.FAULTS) >>> 0
  }

  stats(): TierStats {
    const { header } = this.shared
    const count = (word: number) => Atomics.load(header, word) >>> 0
    return {
      capacity: this.capacity,
      faults: count(words.FAULTS),
      saved: count(words.SAVED),
      loaded: count(words.LOADED),
      lost: count(words.LOST),
    }
  }

  /** Lets the pager end what it began; then keys, file and descriptors are gone. */
  close(): void {
    if (this.closed) return
    this.closed = true
    const { header } = this.shared
    Atomics.store(header, words.CLOSING, 1)
    this.shared.wakePager()
    while (Atomics.load(header, words.STATE) === words.RUNNING) {
      Atomics.wait(header, words.STATE, words.RUNNING, words.WAIT_MS)
    }
    this.awaitLastRites()
    this.keys.close()
    this.store?.close()
    closeFd(this.file.fd)
    closeFd(this.shared.wakeFd)
    if (this.faultFd >= 0) closeFd(this.faultFd)
  }

  /** Descriptors that are still written to stay open: their numbers might be used again. */
  private awaitLastRites(): void {
    const { header } = this.shared
    if (Atomics.load(header, words.STATE) !== words.DEAD) return
    const end = performance.now() + LAST_RITES_MS_MAX
    while (Atomics.load(header, words.BURIED) === 0 && performance.now() < end) {
      Atomics.wait(header, words.BURIED, 0, words.WAIT_MS)
    }
  }

  private request(kind: number, columns: KvColumns, places: Uint32Array): number {
    const { region, first, end } = columns
    assert(end > first && end - first === places.length, 'each column has a place')
    assert(region >= 0 && region < this.memory.regions, `region ${region} exists`)
    this.shared.index(region, end - 1)
    for (const place of places) assert(place < this.capacity, `place ${place} exists`)
    const { moving } = this.shared
    const at = this.shared.index(region, first)
    for (let i = 0; i < places.length; i++) {
      const now = Atomics.load(moving, at + i)
      if (kind === words.SAVE) {
        assert(now < words.LOADING - 1, 'a column that is written out is in memory')
        Atomics.add(moving, at + i, 1)
      } else {
        assert(now === words.AT_REST, 'a column that is brought back is at rest')
        Atomics.store(moving, at + i, words.LOADING)
      }
    }
    // After the marks: a pager that dies fills what it finds marked, so one of both is seen.
    this.check()
    const ticket = this.newTicket()
    this.shared.request({ kind, ticket, region, first, end, places })
    return ticket
  }

  private newTicket(): number {
    this.running++
    return this.nextTicket++
  }

  /** Registers what a slot shows of columns that are being loaded. */
  private guard(slot: number, load: Load): void {
    const { columns, registered } = load
    for (const part of this.shown[slot] ?? []) {
      if (part.region !== columns.region) continue
      const first = Math.max(part.first, columns.first)
      const end = Math.min(part.end, columns.end)
      if (first >= end) continue
      if (this.faultFd < 0) this.settle({ region: columns.region, first, end })
      else {
        registered.push({ slot, first, end })
        this.register(slot, columns.region, first, end)
      }
    }
  }

  private register(slot: number, region: number, first: number, end: number): void {
    const { regionOf, header, geometry } = this.shared
    regionOf.fill(region + 1, slot * geometry.columns + first, slot * geometry.columns + end)
    Atomics.add(header, words.REGISTERED, 1)
    this.eachRange({ slot, first, end }, (address, bytes) => {
      registerFaults(this.faultFd, address, bytes)
    })
  }

  private unregister(piece: Registered): void {
    this.eachRange(piece, (address, bytes) => unregisterFaults(this.faultFd, address, bytes))
    this.release(piece)
  }

  private release({ slot, first, end }: Registered): void {
    const { regionOf, header, geometry } = this.shared
    regionOf.fill(0, slot * geometry.columns + first, slot * geometry.columns + end)
    Atomics.sub(header, words.REGISTERED, 1)
  }

  private eachRange(
    { slot, first, end }: Registered,
    act: (address: number, bytes: number) => void,
  ): void {
    const { ranges, rangeBytes, slotBytes, pageBytes } = this.shared.geometry
    const address = this.memory.address + slot * slotBytes + first * pageBytes
    for (let range = 0; range < ranges; range++) {
      act(address + range * rangeBytes, (end - first) * pageBytes)
    }
  }
}

function geometryFor(memory: TieredMemory, bytes: number): TierGeometry {
  const { layout, slots, regions } = memory
  const one = tierGeometry(layout, slots, regions, 0)
  const capacity = Math.floor(bytes / columnBytes(one))
  if (capacity > 0) return { ...one, capacity }
  throw new LatticeError(
    'usage',
    `${bytes} bytes hold no column of KV, which has ${columnBytes(one)}.`,
    { todo: 'Give --kv-offload a larger size.' },
  )
}

function storeFacts({ directory, prefixes, lost, beyond }: OpenedStore): StoreFacts {
  const tokens = prefixes.reduce((sum, { tokens }) => sum + tokens.length, 0)
  return { directory, prefixes: prefixes.length, tokens, lost, beyond }
}

export function pagerFailed(cause?: LatticeError): LatticeError {
  const why = cause ? `: ${cause.message}` : ''
  return new LatticeError('pager_failed', `The thread that moves KV to disk has died${why}.`, {
    todo: 'Start the engine again; if it dies again, do without --kv-offload.',
    cause,
  })
}

function lost(load: Load | undefined, errno: number): LatticeError {
  const reason = errno === 0 ? 'it is not what was written' : errnoName(errno)
  return load
    ? new LatticeError('kv_lost', `KV did not come back from disk: ${reason}.`)
    : new LatticeError('os_call_failed', `KV could not be written to disk: ${reason}.`)
}
