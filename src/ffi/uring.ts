// Owns an io_uring: operations go in as entries of a mapped ring, completions come out of another,
// and one system call submits, waits or both. One thread only. Source: io_uring(7), io_uring.h.

import { LatticeError } from '../errors.ts'
import { closeFd, errnoName, mapAnonymous, mapRing, unmap, viewMemory } from './libc.ts'
import { addressOf, lastErrno, SYS, syscall } from './syscalls.ts'

const OP_FSYNC = 3
const OP_POLL_ADD = 6
const OP_READ = 22
const OP_WRITE = 23
const FSYNC_DATASYNC = 1
const POLLIN = 1

const SETUP_SINGLE_ISSUER = 1 << 12
const SETUP_DEFER_TASKRUN = 1 << 13
const ENTER_GETEVENTS = 1
const ENTER_EXT_ARG = 8
const MAP_SQES = 0x10000000

const SQE_WORDS = 16
const CQE_WORDS = 4
const EINVAL = 22
const EINTR = 4
const ETIME = 62

export class Uring {
  readonly fd: number
  private readonly ring: Int32Array
  private readonly sqes: Int32Array
  private readonly sqTail: number
  private readonly sqMask: number
  private readonly sqArray: number
  private readonly cqHead: number
  private readonly cqTail: number
  private readonly cqMask: number
  private readonly cqes: number
  private readonly entries: number
  private readonly ringAddress: number
  private readonly ringBytes: number
  private readonly sqesAddress: number
  /** struct io_uring_getevents_arg (24 bytes), then a struct __kernel_timespec. */
  private readonly wait: BigInt64Array
  private readonly waitAddress: number
  private unsubmitted = 0

  /** @throws LatticeError `os_call_failed` where io_uring is not allowed */
  constructor(entries: number) {
    // struct io_uring_params: entries at 0, flags at 2, sq_off at 10, cq_off at 20 (in words).
    const params = new Uint32Array(32)
    params[2] = SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN
    let fd = syscall(SYS.ioUringSetup, entries, addressOf(params))
    if (fd < 0 && lastErrno() === EINVAL) {
      params.fill(0)
      fd = syscall(SYS.ioUringSetup, entries, addressOf(params))
    }
    if (fd < 0) {
      const errno = errnoName(lastErrno())
      throw new LatticeError('os_call_failed', `io_uring_setup failed with ${errno}.`, {
        todo: 'Allow io_uring: see /proc/sys/kernel/io_uring_disabled and the seccomp profile.',
        details: { call: 'io_uring_setup', errno },
      })
    }
    this.fd = fd
    const word = (at: number) => params[at] ?? 0
    this.entries = word(0)
    this.ringBytes = Math.max(word(16) + word(0) * 4, word(25) + word(1) * CQE_WORDS * 4)
    this.ringAddress = mapRing(fd, this.ringBytes, 0)
    this.sqesAddress = mapRing(fd, this.entries * SQE_WORDS * 4, MAP_SQES)
    this.ring = new Int32Array(viewMemory(this.ringAddress, this.ringBytes & ~3))
    this.sqes = new Int32Array(viewMemory(this.sqesAddress, this.entries * SQE_WORDS * 4))
    this.sqTail = word(11) >> 2
    this.sqMask = this.ring[word(12) >> 2] ?? 0
    this.sqArray = word(16) >> 2
    this.cqHead = word(20) >> 2
    this.cqTail = word(21) >> 2
    this.cqMask = this.ring[word(22) >> 2] ?? 0
    this.cqes = word(25) >> 2
    this.waitAddress = mapAnonymous(4096)
    this.wait = new BigInt64Array(viewMemory(this.waitAddress, 64))
    this.wait[2] = BigInt(this.waitAddress + 32)
  }

  /** Entries that can still be added before the next `enter`. */
  get room(): number {
    return this.entries - this.unsubmitted
  }

  read(fd: number, address: number, bytes: number, offset: number, tag: number): void {
    this.add(OP_READ, fd, address, bytes, offset, 0, tag)
  }

  write(fd: number, address: number, bytes: number, offset: number, tag: number): void {
    this.add(OP_WRITE, fd, address, bytes, offset, 0, tag)
  }

  /** Completes when what was written before is on the disk. */
  syncData(fd: number, tag: number): void {
    this.add(OP_FSYNC, fd, 0, 0, 0, FSYNC_DATASYNC, tag)
  }

  /** Completes once, when the descriptor has something to read. */
  pollIn(fd: number, tag: number): void {
    this.add(OP_POLL_ADD, fd, 0, 0, 0, POLLIN, tag)
  }

  /** Submits what was added; waits for a completion or until the time is over, if any is given. */
  enter(waitMs: number): void {
    const submit = this.unsubmitted
    this.unsubmitted = 0
    let flags = ENTER_GETEVENTS
    if (waitMs > 0) {
      flags |= ENTER_EXT_ARG
      this.wait[4] = BigInt(Math.floor(waitMs / 1000))
      this.wait[5] = BigInt(Math.round((waitMs % 1000) * 1e6))
    }
    const wanted = waitMs > 0 ? 1 : 0
    const argument = waitMs > 0 ? this.waitAddress : 0
    const bytes = waitMs > 0 ? 24 : 0
    const done = syscall(SYS.ioUringEnter, this.fd, submit, wanted, flags, argument, bytes)
    if (done >= 0) return
    const errno = lastErrno()
    if (errno === ETIME || errno === EINTR) return
    throw new LatticeError('os_call_failed', `io_uring_enter failed with ${errnoName(errno)}.`)
  }

  /** Gives every completion to `take`: its tag and its result (bytes, or minus errno). */
  drain(take: (tag: number, result: number) => void): number {
    let head = this.ring[this.cqHead] ?? 0
    const tail = Atomics.load(this.ring, this.cqTail)
    const count = (tail - head) | 0
    while (head !== tail) {
      const at = this.cqes + (head & this.cqMask) * CQE_WORDS
      const tag = this.ring[at] ?? 0
      const result = this.ring[at + 2] ?? 0
      head = (head + 1) | 0
      Atomics.store(this.ring, this.cqHead, head)
      take(tag, result)
    }
    return count
  }

  close(): void {
    unmap(this.ringAddress, this.ringBytes)
    unmap(this.sqesAddress, this.entries * SQE_WORDS * 4)
    unmap(this.waitAddress, 4096)
    closeFd(this.fd)
  }

  private add(
    opcode: number,
    fd: number,
    address: number,
    bytes: number,
    offset: number,
    flags: number,
    tag: number,
  ): void {
    const { ring, sqes } = this
    const tail = ring[this.sqTail] ?? 0
    const index = tail & this.sqMask
    const at = index * SQE_WORDS
    sqes.fill(0, at, at + SQE_WORDS)
    sqes[at] = opcode
    sqes[at + 1] = fd
    sqes[at + 2] = (offset % 2 ** 32) | 0
    sqes[at + 3] = Math.floor(offset / 2 ** 32)
    sqes[at + 4] = (address % 2 ** 32) | 0
    sqes[at + 5] = Math.floor(address / 2 ** 32)
    sqes[at + 6] = bytes
    sqes[at + 7] = flags
    sqes[at + 8] = tag
    ring[this.sqArray + index] = index
    Atomics.store(ring, this.sqTail, (tail + 1) | 0)
    this.unsubmitted++
  }
}
