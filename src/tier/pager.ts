// Owns the pager's loop: it takes requests, keeps the disk busy with a few buffers of columns, and
// answers touches of absent pages. Loads go before saves, a touched column before all others, and
// otherwise what was asked for first.
//
// A load:  disk → buffer → authenticated and decrypted there → memory → whoever waits is woken
// A save:  memory → buffer → encrypted there → disk

import { present } from '../assert.ts'
import { takeEvent, unmap, viewMemory } from '../ffi/libc.ts'
import { FaultReader, wakeFaults } from '../ffi/userfaultfd.ts'
import { Uring } from '../ffi/uring.ts'
import { type LogEntry, type LogStart, LogWriter } from './store/log-writer.ts'
import { ColumnSeals, type SealKeys } from './seals.ts'
import * as words from './shared.ts'
import { type TierGeometry, type TierRequest, TierShared } from './shared.ts'
import { columnsOfBuffer, TransferBuffer } from './transfer.ts'

/** All that the pager's thread is given. Descriptors and addresses are the process's. */
export interface PagerStart {
  shared: SharedArrayBuffer
  geometry: TierGeometry
  /** Of the KV memory. */
  memoryFd: number
  /** Of slot 0. */
  slotsAddress: number
  /** -1: touches of absent pages are not reported, so nobody may touch any. */
  faultFd: number
  fileFd: number
  /** An eventfd that wakes it. */
  wakeFd: number
  keys: SealKeys
  /** Of a store that outlives the process. */
  log?: LogStart
  /** The engine's: it grows with everything that the engine should look at. */
  signal: SharedArrayBuffer
  fault?: PagerFault
}

/** What goes wrong on purpose once this many columns have moved: it throws, or sleeps for ever. */
export interface PagerFault {
  kind: 'throw' | 'stall'
  afterColumns: number
}

const BUFFERS = 6
/** Saves leave buffers for loads, and loads one for touches. */
const BUFFERS_FOR_SAVES = 3
const BUFFERS_FOR_LOADS = BUFFERS - 1

const RING_ENTRIES = 1024
const FAULT_TAG = BUFFERS
const WAKE_TAG = BUFFERS + 1
const LOG_TAG = BUFFERS + 2
const EIO = 5

/** Columns [first, end) of a ticket that nobody works on yet. */
interface Piece {
  ticket: number
  region: number
  first: number
  end: number
}

interface Ticket {
  /** The column of the first place. */
  first: number
  places: Uint32Array
  columnsLeft: number
  told: boolean
  outcome: number
  errno: number
}

interface Transfer {
  buffer: TransferBuffer
  kind: number
  /** Somebody waits for it. */
  touched: boolean
  id: number
  /** What `id` stands for. */
  ticket: Ticket
  region: number
  first: number
  count: number
  /** Disk operations that have not completed; idle at 0. */
  running: number
  errno: number
}

export class Pager {
  private readonly start: PagerStart
  private readonly shared: TierShared
  private readonly seals: ColumnSeals
  private readonly signal: Int32Array
  private readonly uring = new Uring(RING_ENTRIES)
  private readonly faults: FaultReader | undefined
  private readonly log: LogWriter | undefined
  private readonly columnBytes: number
  private readonly columnsMax: number
  private readonly transfers: Transfer[]
  private readonly completed: Transfer[] = []
  private readonly tickets = new Map<number, Ticket>()
  private readonly touched: Piece[] = []
  private readonly loads: Piece[] = []
  private readonly saves: Piece[] = []
  /** What could not be told yet because the engine did not look. */
  private readonly untold: number[] = []
  /** By column's index: addresses whose threads wait for it. */
  private readonly waiting = new Map<number, number[]>()
  private faultsArmed = false
  private faultsReady = false
  private wakeArmed = false
  private busy = 0
  private moved = 0

  constructor(start: PagerStart) {
    const { geometry } = start
    this.start = start
    this.shared = new TierShared(geometry, start.wakeFd, start.shared)
    this.seals = new ColumnSeals(this.shared, start.keys)
    this.signal = new Int32Array(start.signal)
    this.faults = start.faultFd < 0 ? undefined : new FaultReader(start.faultFd)
    const { log, fileFd } = start
    const logged = (ticket: number, errno: number) => this.logged(ticket, errno)
    this.log = log && new LogWriter(log, this.uring, fileFd, LOG_TAG, logged)
    this.columnBytes = words.columnBytes(geometry)
    this.columnsMax = columnsOfBuffer(geometry)
    this.transfers = Array.from({ length: BUFFERS }, () => ({
      buffer: new TransferBuffer(geometry, start.memoryFd),
      kind: 0,
      touched: false,
      id: 0,
      ticket: NO_TICKET,
      region: 0,
      first: 0,
      count: 0,
      running: 0,
      errno: 0,
    }))
  }

  /** Returns when the engine closes it and all that it began is done. */
  run(): void {
    const { header } = this.shared
    for (;;) {
      const seen = Atomics.load(header, words.PAGER_WAKE)
      const closing = Atomics.load(header, words.CLOSING) === 1
      this.takeRequests()
      this.begin()
      this.tell()
      const working = this.busy > 0 || this.log?.busy === true
      if (!working && closing) return
      // While anything is registered, a touch may have to be answered.
      if (working || Atomics.load(header, words.REGISTERED) > 0) this.wait(seen)
      else Atomics.wait(header, words.PAGER_WAKE, seen, this.untold.length > 0 ? 1 : undefined)
    }
  }

  close(): void {
    this.log?.close()
    this.uring.close()
    this.seals.close()
    for (const { buffer } of this.transfers) buffer.close()
  }

  private takeRequests(): void {
    for (;;) {
      const request = this.shared.nextRequest()
      if (!request) return
      const { kind, ticket, region, first, end } = request
      if (kind === words.KEEP || kind === words.FORGET) {
        present(this.log, 'the log of a store').add(takeLogEntry(request))
        if (kind === words.KEEP) this.tickets.set(ticket, NO_TICKET)
        continue
      }
      const queue = kind === words.SAVE ? this.saves : this.loads
      queue.push({ ticket, region, first, end })
      this.tickets.set(ticket, newTicket(request))
    }
  }

  /** Starts as many transfers as there are buffers for. */
  private begin(): void {
    for (;;) {
      const free = this.transfers.find(({ running }) => running === 0)
      if (!free) break
      if (this.touched.length > 0) this.beginOne(free, words.LOAD, this.touched)
      // A disk's elevator would take what lies before a touched column first, as long as there is
      // more of it.
      else if (this.transfers.some(({ touched, running }) => touched && running > 0)) break
      else if (this.loads.length > 0 && this.busy < BUFFERS_FOR_LOADS) {
        this.beginOne(free, words.LOAD, this.loads)
      } else if (this.saves.length > 0 && this.busy < BUFFERS_FOR_SAVES) {
        this.beginOne(free, words.SAVE, this.saves)
      } else break
    }
    this.log?.begin()
    if (this.faults && !this.faultsArmed) {
      this.uring.pollIn(this.start.faultFd, FAULT_TAG)
      this.faultsArmed = true
    }
    this.uring.enter(0)
  }

  private beginOne(transfer: Transfer, kind: number, queue: Piece[]): void {
    const piece = present(queue[0], 'work to begin')
    transfer.kind = kind
    transfer.touched = queue === this.touched
    transfer.id = piece.ticket
    transfer.ticket = present(this.tickets.get(piece.ticket), 'the ticket of a piece')
    transfer.region = piece.region
    transfer.first = piece.first
    transfer.count = Math.min(piece.end - piece.first, this.columnsMax)
    transfer.errno = 0
    piece.first += transfer.count
    if (piece.first === piece.end) queue.shift()
    if (kind === words.SAVE) this.sealAll(transfer)
    this.operate(transfer)
    this.busy++
  }

  private sealAll(transfer: Transfer): void {
    const { buffer, region, first, count } = transfer
    buffer.gather(region, first, count)
    for (let i = 0; i < count; i++) this.seals.seal(buffer.addressOf(i), placeOf(transfer, i))
  }

  /** One disk operation for every run of places that follow each other. */
  private operate(transfer: Transfer): void {
    const { buffer, count, kind } = transfer
    const { uring, columnBytes: bytes } = this
    const tag = this.transfers.indexOf(transfer)
    for (let i = 0; i < count;) {
      const place = placeOf(transfer, i)
      let run = 1
      while (i + run < count && placeOf(transfer, i + run) === place + run) run++
      if (uring.room === 0) uring.enter(0)
      const operation = kind === words.SAVE ? 'write' : 'read'
      uring[operation](this.start.fileFd, buffer.addressOf(i), run * bytes, place * bytes, tag)
      transfer.running++
      i += run
    }
  }

  /** Sleeps until the disk or a toucher has something for it. */
  private wait(seen: number): void {
    const { header } = this.shared
    if (!this.wakeArmed) {
      this.uring.pollIn(this.start.wakeFd, WAKE_TAG)
      this.wakeArmed = true
    }
    Atomics.store(header, words.IN_RING, 1)
    const called = Atomics.load(header, words.PAGER_WAKE) !== seen
    this.uring.enter(called ? 0 : words.WAIT_MS)
    Atomics.store(header, words.IN_RING, 0)
    this.uring.drain((tag, result) => this.complete(tag, result))
    if (this.faultsReady) this.answerFaults()
    for (let transfer = this.completed.shift(); transfer; transfer = this.completed.shift()) {
      this.end(transfer)
      // The disk should not idle while the next one is decrypted, nor a toucher wait for all.
      this.begin()
      this.uring.drain((tag, result) => this.complete(tag, result))
      if (this.faultsReady) this.answerFaults()
    }
  }

  private complete(tag: number, result: number): void {
    if (tag === FAULT_TAG) {
      this.faultsArmed = false
      this.faultsReady = true
      return
    }
    if (tag === WAKE_TAG) {
      this.wakeArmed = false
      takeEvent(this.start.wakeFd)
      return
    }
    if (tag === LOG_TAG) {
      this.log?.complete(result)
      return
    }
    const transfer = present(this.transfers[tag], 'the transfer of a completion')
    // Nothing else makes an operation on a file of fixed size end short.
    if (result < 0) transfer.errno = -result
    else if (result % this.columnBytes !== 0 || result === 0) transfer.errno = EIO
    transfer.running--
    if (transfer.running === 0) {
      // It stays out of `begin`'s reach until its columns are where they belong.
      transfer.running = -1
      if (transfer.touched) this.completed.unshift(transfer)
      else this.completed.push(transfer)
    }
  }

  private end(transfer: Transfer): void {
    const { shared } = this
    const { kind, region, first, count, id, ticket } = transfer
    if (kind === words.LOAD) this.openAll(transfer)
    else if (transfer.errno !== 0) this.fail(transfer, words.DONE_IO)
    this.moved += count
    if (this.moved > (this.start.fault?.afterColumns ?? Infinity)) this.misbehave()
    const at = shared.index(region, first)
    for (let i = 0; i < count; i++) {
      if (kind === words.LOAD) Atomics.store(shared.moving, at + i, words.AT_REST)
      else Atomics.sub(shared.moving, at + i, 1)
      this.wake(at + i)
    }
    Atomics.add(shared.header, kind === words.SAVE ? words.SAVED : words.LOADED, count)
    shared.settle()
    transfer.running = 0
    this.busy--
    ticket.columnsLeft -= count
    if (ticket.columnsLeft > 0) return
    if (ticket.outcome === words.DONE_WELL) this.untold.push(id)
    else if (ticket.told) this.tickets.delete(id)
  }

  private logged(id: number, errno: number): void {
    if (!this.tickets.has(id)) return
    const outcome = errno === 0 ? words.DONE_WELL : words.DONE_IO
    this.tickets.set(id, { ...NO_TICKET, outcome, errno })
    this.untold.push(id)
  }

  private misbehave(): void {
    if (this.start.fault?.kind === 'throw') throw new Error('it failed on purpose')
    for (;;) Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0)
  }

  private openAll(transfer: Transfer): void {
    const { buffer, region, first, count, errno, ticket } = transfer
    for (let i = 0; i < count; i++) {
      const place = placeOf(transfer, i)
      if (errno === 0 && this.seals.open(buffer.addressOf(i), place)) continue
      // The engine must know before a waiting thread reads what is not the column's.
      this.fail(transfer, errno === 0 ? words.DONE_REFUSED : words.DONE_IO)
      Atomics.add(this.shared.header, words.LOST, 1)
      buffer.poison(i)
    }
    if (ticket.outcome !== words.DONE_WELL && !ticket.told) this.tell()
    buffer.scatter(region, first, count)
  }

  private fail({ id, ticket, errno }: Transfer, outcome: number): void {
    if (ticket.outcome !== words.DONE_WELL) return
    ticket.outcome = outcome
    ticket.errno = errno
    this.untold.push(id)
  }

  private tell(): void {
    let told = 0
    for (const id of this.untold) {
      const ticket = present(this.tickets.get(id), 'a ticket to tell of')
      if (!this.shared.finish(id, ticket.outcome, ticket.errno)) break
      ticket.told = true
      if (ticket.columnsLeft === 0) this.tickets.delete(id)
      told++
    }
    if (told === 0) return
    this.untold.splice(0, told)
    Atomics.add(this.signal, 0, 1)
    Atomics.notify(this.signal, 0)
  }

  private answerFaults(): void {
    this.faultsReady = false
    const { slotBytes, rangeBytes, pageBytes, columns } = this.start.geometry
    this.faults?.read((address) => {
      Atomics.add(this.shared.header, words.FAULTS, 1)
      const offset = address - this.start.slotsAddress
      const slot = Math.floor(offset / slotBytes)
      const column = Math.floor(((offset % slotBytes) % rangeBytes) / pageBytes)
      const region = Atomics.load(this.shared.regionOf, slot * columns + column) - 1
      const index = region < 0 ? -1 : this.shared.index(region, column)
      if (index < 0 || Atomics.load(this.shared.moving, index) !== words.LOADING) {
        // It has arrived meanwhile, or the slot shows something else by now.
        this.wakeAt(address)
        return
      }
      const waiting = this.waiting.get(index)
      if (waiting) waiting.push(address)
      else this.waiting.set(index, [address])
      this.hurry(region, column)
    })
  }

  /** Lets a column that is not being loaded yet jump the queue. */
  private hurry(region: number, column: number): void {
    const at = this.loads.findIndex(
      (piece) => piece.region === region && column >= piece.first && column < piece.end,
    )
    if (at < 0) return
    const { ticket, first, end } = present(this.loads[at], 'a piece with a touched column')
    const rest = [
      { ticket, region, first, end: column },
      { ticket, region, first: column + 1, end },
    ].filter((piece) => piece.first < piece.end)
    this.loads.splice(at, 1, ...rest)
    this.touched.push({ ticket, region, first: column, end: column + 1 })
  }

  private wake(index: number): void {
    const addresses = this.waiting.get(index)
    if (!addresses) return
    this.waiting.delete(index)
    for (const address of addresses) this.wakeAt(address)
  }

  private wakeAt(address: number): void {
    const { pageBytes } = this.start.geometry
    wakeFaults(this.start.faultFd, address - (address % pageBytes), pageBytes)
  }
}

const NO_TICKET: Ticket = {
  first: 0,
  places: new Uint32Array(0),
  columnsLeft: 0,
  told: false,
  outcome: words.DONE_WELL,
  errno: 0,
}

function newTicket({ first, end, places }: TierRequest): Ticket {
  return { ...NO_TICKET, first, places, columnsLeft: end - first }
}

/** Where column `i` of a transfer lies on disk. */
function placeOf({ ticket, first }: Transfer, i: number): number {
  return present(ticket.places[first - ticket.first + i], 'the place of a column')
}

/** Takes over the block of a request: the id of a prefix, then what the log shall say. */
function takeLogEntry({ kind, ticket, region, first, end }: TierRequest): LogEntry {
  const address = (region >>> 0) + first * 2 ** 32
  const block = Buffer.from(viewMemory(address, end))
  const id = Number(block.readBigUInt64LE(0))
  const payload = Uint8Array.from(block.subarray(8))
  unmap(address, end)
  return { ticket, id, keeps: kind === words.KEEP, payload }
}
