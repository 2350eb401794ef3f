// Owns appending to a store's log, on the pager's thread. What waits is written together: first the
// columns must be on the disk, then the frames, and only then does anyone hear that it is durable.
// When more than half of the log is about prefixes that are gone, it is written anew.

import {
  closeSync,
  fsyncSync,
  ftruncateSync,
  openSync,
  readSync,
  renameSync,
  writeSync,
} from 'node:fs'
import { dirname } from 'node:path'
import { AesGcm } from '../../ffi/aes-gcm.ts'
import { mapAnonymous, unmap, viewMemory } from '../../ffi/libc.ts'
import type { Uring } from '../../ffi/uring.ts'
import { FrameWriter } from './frames.ts'

export interface LogStart {
  path: string
  /** Bytes of it that count; what follows is overwritten. */
  end: number
  /** Bytes before the first frame. */
  headBytes: number
  /** Something of it was lost: it is written anew, so that this is said once. */
  rewrite: boolean
  /** Prefixes that it holds: id, offset of the frame, its bytes. */
  frames: readonly (readonly [id: number, offset: number, bytes: number])[]
  /** Address of the key that frames are sealed with. */
  key: number
  storeId: Uint8Array
  salt: Uint8Array
}

export interface LogEntry {
  ticket: number
  id: number
  /** undefined: the prefix is gone, and `payload` says so. */
  keeps: boolean
  payload: Uint8Array
}

/** A smaller log is not worth writing anew. */
const COMPACT_BYTES_MIN = 1 << 20

export class LogWriter {
  private readonly start: LogStart
  private readonly cipher: AesGcm
  private readonly frames: FrameWriter
  private readonly uring: Uring
  private readonly columnsFd: number
  private readonly tag: number
  private readonly compactBytesMin: number
  private readonly done: (ticket: number, errno: number) => void
  private readonly live = new Map<number, { offset: number; bytes: number }>()
  private fd: number
  private end: number
  private garbage: number
  private queue: LogEntry[] = []
  private batch: LogEntry[] = []
  private sizes: number[] = []
  private stage: 'idle' | 'columns' | 'frames' | 'log' = 'idle'
  private address = 0
  private bytes = 0

  /** @param tag of its operations in the ring; one at a time is under way */
  constructor(
    start: LogStart,
    uring: Uring,
    columnsFd: number,
    tag: number,
    done: (ticket: number, errno: number) => void,
    compactBytesMin = COMPACT_BYTES_MIN,
  ) {
    this.start = start
    this.uring = uring
    this.columnsFd = columnsFd
    this.tag = tag
    this.done = done
    this.compactBytesMin = compactBytesMin
    this.cipher = new AesGcm(start.key)
    this.frames = new FrameWriter(this.cipher, start.storeId, start.salt)
    this.fd = openSync(start.path, 'r+')
    this.end = start.end
    let live = start.headBytes
    for (const [id, offset, bytes] of start.frames) {
      this.live.set(id, { offset, bytes })
      live += bytes
    }
    this.garbage = this.end - live
    ftruncateSync(this.fd, this.end)
    if (start.rewrite) this.compact()
    else this.compactIfWorthwhile()
  }

  get busy(): boolean {
    return this.stage !== 'idle' || this.queue.length > 0
  }

  add(entry: LogEntry): void {
    this.queue.push(entry)
  }

  /** Begins to write what waits, unless it is writing. */
  begin(): void {
    if (this.stage !== 'idle' || this.queue.length === 0) return
    this.batch = this.queue
    this.queue = []
    this.stage = 'columns'
    this.uring.syncData(this.columnsFd, this.tag)
  }

  /** An operation of the ring has ended, with bytes or minus errno. */
  complete(result: number): void {
    const short = this.stage === 'frames' && result >= 0 && result !== this.bytes
    if (result < 0 || short) this.finish(short ? EIO : -result)
    else if (this.stage === 'columns') this.write()
    else if (this.stage === 'frames') {
      this.stage = 'log'
      this.uring.syncData(this.fd, this.tag)
    } else this.finish(0)
  }

  close(): void {
    this.cipher.close()
    closeSync(this.fd)
  }

  private write(): void {
    const frames = this.batch.map(({ payload }) => this.frames.frame(payload))
    this.sizes = frames.map(({ length }) => length)
    const data = Buffer.concat(frames)
    this.bytes = data.length
    this.address = mapAnonymous(this.bytes)
    new Uint8Array(viewMemory(this.address, this.bytes)).set(data)
    this.stage = 'frames'
    this.uring.write(this.fd, this.address, this.bytes, this.end, this.tag)
  }

  private finish(errno: number): void {
    if (this.address !== 0) unmap(this.address, this.bytes)
    this.address = 0
    if (errno === 0) this.account()
    for (const { ticket } of this.batch) this.done(ticket, errno)
    this.batch = []
    this.stage = 'idle'
    this.compactIfWorthwhile()
  }

  private account(): void {
    this.batch.forEach(({ id, keeps }, i) => {
      const bytes = this.sizes[i] ?? 0
      if (keeps) this.live.set(id, { offset: this.end, bytes })
      else {
        this.garbage += bytes + (this.live.get(id)?.bytes ?? 0)
        this.live.delete(id)
      }
      this.end += bytes
    })
  }

  private compactIfWorthwhile(): void {
    if (this.end >= this.compactBytesMin && this.garbage * 2 >= this.end) this.compact()
  }

  private compact(): void {
    // Frames say nothing of where they lie, so they are copied as they are.
    const { path, headBytes } = this.start
    const fresh = `${path}.new`
    const fd = openSync(fresh, 'w+', 0o600)
    let at = 0
    const copy = (offset: number, bytes: number) => {
      const data = Buffer.alloc(bytes)
      readSync(this.fd, data, 0, bytes, offset)
      at += writeSync(fd, data, 0, bytes, at)
    }
    copy(0, headBytes)
    for (const frame of this.live.values()) {
      const to = at
      copy(frame.offset, frame.bytes)
      frame.offset = to
    }
    fsyncSync(fd)
    renameSync(fresh, path)
    syncDirectory(dirname(path))
    closeSync(this.fd)
    this.fd = fd
    this.end = at
    this.garbage = 0
  }
}

/** What was renamed or made in a directory survives a crash. */
export function syncDirectory(path: string): void {
  const fd = openSync(path, 'r')
  fsyncSync(fd)
  closeSync(fd)
}

const EIO = 5
