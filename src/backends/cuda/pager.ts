// Owns the thread that maps memory: whoever needs pages says so in a ring, goes on, and waits only
// if a step is about to run before its pages are there.
//
// A map with access costs 29 µs, an unmap 16, a creation 10: none waits for the GPU, and done by
// another thread they do not slow down launches (docs/decisions/0011).

import { Worker } from 'node:worker_threads'
import { LatticeError, type LatticeErrorJson } from '../../errors.ts'
import type { CudaDevice } from './device.ts'
import { createSink, PageCommands } from './page-commands.ts'

/** Frames are physical memory, numbered by whoever creates them. Commands run in order. */
export interface Pager {
  create(frame: number, bytes: number): void
  /** As if there was no memory for it, which nobody has to be told. */
  standIn(frame: number): void
  /** Of a frame that is mapped nowhere. */
  release(frame: number): void
  /** Maps a whole frame, for the GPU to read and write. */
  map(address: number, bytes: number, frame: number): void
  unmap(address: number, bytes: number): void
  /** Queues a copy on a stream, of mapped memory, to or from pinned memory of the host. */
  copyToHost(to: number, from: number, bytes: number, stream: number): void
  copyToGpu(to: number, from: number, bytes: number, stream: number): void
  record(event: number, stream: number): void
  /** Commands given so far; `wait` takes it. */
  readonly ticket: number
  /** Commands that have been carried out. */
  readonly done: number
  /**
   * Returns when the first `ticket` commands have been carried out.
   * @returns whether that was not so already
   * @throws LatticeError `gpu_call_failed` of the command that failed; none after it is carried out
   */
  wait(ticket: number): boolean
  /**
   * Frames for which there was no memory, since the last call: they are mapped, but what is written
   * there is lost.
   */
  takeAbsent(): readonly number[]
  close(): void
}

const NONE: readonly number[] = []

export const COMMAND = {
  create: 1,
  release: 2,
  map: 3,
  unmap: 4,
  copyToHost: 5,
  copyToGpu: 6,
  record: 7,
  standIn: 8,
} as const

/** Commands that may be under way; more make the engine wait. */
const RING_COMMANDS = 1 << 14
/** Numbers of a command: kind, address, bytes, a frame or another address, a stream. */
export const COMMAND_NUMBERS = 5
const ERROR_BYTES = 4096
/** No command takes a second; a thread starts in 0.1 s. */
const STUCK_MS = 20_000

/** What both threads see. */
export interface PagerRing {
  /** See `STATE`. */
  state: Int32Array<SharedArrayBuffer>
  commands: Float64Array<SharedArrayBuffer>
  /** Frames for which there was no memory, a ring. */
  absent: Int32Array<SharedArrayBuffer>
  /** JSON of the error, UTF-8, once there is one. */
  error: Uint8Array<SharedArrayBuffer>
}

/** Counters wrap around at 2^32; only differences count. */
export const STATE = { given: 0, done: 1, errorBytes: 2, closing: 3, absent: 4 } as const

export interface PagerThreadData {
  ring: PagerRing
  device: number
  context: number
  sink: number
}

/** Carries commands out on a thread of its own. */
export class ThreadPager implements Pager {
  private given = 0
  private absentTaken = 0
  private readonly ring: PagerRing = {
    state: new Int32Array(new SharedArrayBuffer(20)),
    absent: new Int32Array(new SharedArrayBuffer(RING_COMMANDS * 4)),
    commands: new Float64Array(new SharedArrayBuffer(RING_COMMANDS * COMMAND_NUMBERS * 8)),
    error: new Uint8Array(new SharedArrayBuffer(ERROR_BYTES)),
  }

  constructor(device: CudaDevice) {
    const { driver, context, info } = device
    const sink = createSink(driver, info.index)
    const workerData: PagerThreadData = { ring: this.ring, device: info.index, context, sink }
    const worker = new Worker(new URL('pager-thread.ts', import.meta.url), { workerData })
    worker.unref()
    worker.on('error', () => {})
  }

  get ticket(): number {
    return this.given
  }

  get done(): number {
    const behind = (this.given - Atomics.load(this.ring.state, STATE.done)) | 0
    return this.given - behind
  }

  create(frame: number, bytes: number): void {
    this.give(COMMAND.create, 0, bytes, frame)
  }

  standIn(frame: number): void {
    this.give(COMMAND.standIn, 0, 0, frame)
  }

  release(frame: number): void {
    this.give(COMMAND.release, 0, 0, frame)
  }

  map(address: number, bytes: number, frame: number): void {
    this.give(COMMAND.map, address, bytes, frame)
  }

  unmap(address: number, bytes: number): void {
    this.give(COMMAND.unmap, address, bytes, 0)
  }

  copyToHost(to: number, from: number, bytes: number, stream: number): void {
    this.give(COMMAND.copyToHost, to, bytes, from, stream)
  }

  copyToGpu(to: number, from: number, bytes: number, stream: number): void {
    this.give(COMMAND.copyToGpu, to, bytes, from, stream)
  }

  record(event: number, stream: number): void {
    this.give(COMMAND.record, event, 0, 0, stream)
  }

  wait(ticket: number): boolean {
    if (this.done >= ticket) return this.rethrow()
    while (this.done < ticket) {
      this.rethrow()
      const seen = Atomics.load(this.ring.state, STATE.done)
      if (this.done >= ticket) break
      const outcome = Atomics.wait(this.ring.state, STATE.done, seen, STUCK_MS)
      if (outcome === 'timed-out') {
        throw new LatticeError('backend_failed', `The pager did nothing for ${STUCK_MS} ms.`, {
          todo: '`nvidia-smi` shows whether the driver answers at all.',
        })
      }
    }
    this.rethrow()
    return true
  }

  takeAbsent(): readonly number[] {
    const { state, absent } = this.ring
    const count = Atomics.load(state, STATE.absent)
    if (count === this.absentTaken) return NONE
    const frames: number[] = []
    for (; this.absentTaken < count; this.absentTaken++) {
      frames.push(absent[this.absentTaken % absent.length] ?? 0)
    }
    return frames
  }

  /** Everything asked for is done first; the driver takes back what is left when it ends. */
  close(): void {
    Atomics.store(this.ring.state, STATE.closing, 1)
    Atomics.notify(this.ring.state, STATE.given)
    const { errorBytes, done } = STATE
    while (this.done < this.given && Atomics.load(this.ring.state, errorBytes) === 0) {
      Atomics.wait(this.ring.state, done, Atomics.load(this.ring.state, done), 1000)
    }
  }

  private give(kind: number, address: number, bytes: number, frame: number, stream = 0): void {
    if (this.given - this.done >= RING_COMMANDS) this.wait(this.given - RING_COMMANDS / 2)
    const at = (this.given % RING_COMMANDS) * COMMAND_NUMBERS
    const { commands, state } = this.ring
    commands[at] = kind
    commands[at + 1] = address
    commands[at + 2] = bytes
    commands[at + 3] = frame
    commands[at + 4] = stream
    this.given++
    Atomics.store(state, STATE.given, this.given | 0)
    Atomics.notify(state, STATE.given)
  }

  /** @returns false, so that it reads as "did not wait" */
  private rethrow(): false {
    const bytes = Atomics.load(this.ring.state, STATE.errorBytes)
    if (bytes === 0) return false
    const json = Buffer.from(this.ring.error.slice(0, bytes)).toString('utf8')
    throw LatticeError.fromJSON(JSON.parse(json) as LatticeErrorJson)
  }
}

/** Carries commands out at once, or, for tests, one whenever somebody asks how far it is. */
export class InlinePager implements Pager {
  ticket = 0
  private carriedOut = 0
  private readonly commands: PageCommands
  private readonly late: boolean
  private readonly pending: (() => void)[] = []

  constructor(device: CudaDevice, late = false) {
    const { driver, info } = device
    this.commands = new PageCommands(driver, info.index, createSink(driver, info.index))
    this.late = late
  }

  get done(): number {
    const { carriedOut } = this
    if (this.late) this.wait(Math.min(this.ticket, carriedOut + 1))
    return carriedOut
  }

  create(frame: number, bytes: number): void {
    this.give(() => this.commands.create(frame, bytes))
  }

  standIn(frame: number): void {
    this.give(() => this.commands.standIn(frame))
  }

  release(frame: number): void {
    this.give(() => this.commands.release(frame))
  }

  map(address: number, bytes: number, frame: number): void {
    this.give(() => this.commands.map(address, bytes, frame))
  }

  unmap(address: number, bytes: number): void {
    this.give(() => this.commands.unmap(address, bytes))
  }

  copyToHost(to: number, from: number, bytes: number, stream: number): void {
    this.give(() => this.commands.copyToHost(to, from, bytes, stream))
  }

  copyToGpu(to: number, from: number, bytes: number, stream: number): void {
    this.give(() => this.commands.copyToGpu(to, from, bytes, stream))
  }

  record(event: number, stream: number): void {
    this.give(() => this.commands.record(event, stream))
  }

  wait(ticket: number): boolean {
    const waits = this.carriedOut < ticket
    for (; this.carriedOut < ticket; this.carriedOut++) this.pending.shift()?.()
    this.commands.flush()
    return waits
  }

  takeAbsent(): readonly number[] {
    return this.commands.absent.splice(0)
  }

  close(): void {
    this.wait(this.ticket)
    this.commands.close()
  }

  private give(command: () => void): void {
    this.pending.push(command)
    this.ticket++
    if (!this.late) this.wait(this.ticket)
  }
}
