// Owns userfaultfd: a descriptor that reports touches of absent pages in registered ranges, whose
// threads wait until they are woken. Source: ioctl_userfaultfd(2), linux/userfaultfd.h.

import { closeSync, openSync, readSync } from 'node:fs'
import { closeFd, errnoName } from './libc.ts'
import { ioctl, lastErrno, SYS, syscall } from './syscalls.ts'
import { LatticeError } from '../errors.ts'

const O_CLOEXEC_NONBLOCK = 0o2000000 | 0o4000
const USER_MODE_ONLY = 1

const API = 0xaa
const EAGAIN_CODE = 'EAGAIN'
const IOC_NEW = 0xaa00
const IOC_API = 0xc018aa3f
const IOC_REGISTER = 0xc020aa00
const IOC_UNREGISTER = 0x8010aa01
const IOC_WAKE = 0x8010aa02
const REGISTER_MODE_MISSING = 1
const FEATURE_MISSING_SHMEM = 1 << 5

const MESSAGE_BYTES = 32
const EVENT_PAGEFAULT = 0x12

export interface FaultDescriptor {
  fd: number
  /** What may touch an absent page: everyone, or user code only (system calls get EFAULT). */
  answers: 'all' | 'user'
}

/** A descriptor, with as much right as this process can get; undefined if it gets none. */
export function openFaults(): FaultDescriptor | undefined {
  const attempts: [FaultDescriptor['answers'], () => number][] = [
    ['all', () => syscall(SYS.userfaultfd, O_CLOEXEC_NONBLOCK)],
    ['all', () => openThroughDevice()],
    ['user', () => syscall(SYS.userfaultfd, O_CLOEXEC_NONBLOCK | USER_MODE_ONLY)],
  ]
  for (const [answers, attempt] of attempts) {
    const fd = attempt()
    if (fd < 0) continue
    const api = BigUint64Array.from([BigInt(API), BigInt(FEATURE_MISSING_SHMEM), 0n])
    if (ioctl(fd, IOC_API, api) === 0) return { fd, answers }
    closeFd(fd)
  }
  return undefined
}

function openThroughDevice(): number {
  let device: number
  try {
    device = openSync('/dev/userfaultfd', 'r+')
  } catch {
    return -1
  }
  const fd = ioctl(device, IOC_NEW, O_CLOEXEC_NONBLOCK)
  closeSync(device)
  return fd
}

/** From now on a touch of an absent page of the range waits for `wakeFaults`. */
export function registerFaults(fd: number, address: number, bytes: number): void {
  const argument = BigUint64Array.from([
    BigInt(address),
    BigInt(bytes),
    BigInt(REGISTER_MODE_MISSING),
    0n,
  ])
  if (ioctl(fd, IOC_REGISTER, argument) !== 0) throw refused('UFFDIO_REGISTER', bytes)
}

/** Gives absent pages of the range back to the kernel, which fills them with zeros. Wakes all. */
export function unregisterFaults(fd: number, address: number, bytes: number): void {
  const argument = BigUint64Array.from([BigInt(address), BigInt(bytes)])
  if (ioctl(fd, IOC_UNREGISTER, argument) !== 0) throw refused('UFFDIO_UNREGISTER', bytes)
}

/** Threads that wait for a page of the range look again. */
export function wakeFaults(fd: number, address: number, bytes: number): void {
  const argument = BigUint64Array.from([BigInt(address), BigInt(bytes)])
  if (ioctl(fd, IOC_WAKE, argument) !== 0) throw refused('UFFDIO_WAKE', bytes)
}

/** Reads the messages that have come, without waiting. */
export class FaultReader {
  private readonly fd: number
  private readonly buffer = Buffer.alloc(64 * MESSAGE_BYTES)

  constructor(fd: number) {
    this.fd = fd
  }

  /** Gives the address of every touch that waits to `take`. */
  read(take: (address: number) => void): void {
    for (;;) {
      let bytes: number
      try {
        bytes = readSync(this.fd, this.buffer)
      } catch (thrown) {
        if ((thrown as NodeJS.ErrnoException).code === EAGAIN_CODE) return
        throw thrown
      }
      for (let at = 0; at < bytes; at += MESSAGE_BYTES) {
        if (this.buffer[at] === EVENT_PAGEFAULT) take(Number(this.buffer.readBigUInt64LE(at + 16)))
      }
      if (bytes < this.buffer.length) return
    }
  }
}

function refused(call: string, bytes: number): LatticeError {
  const errno = errnoName(lastErrno())
  return new LatticeError('os_call_failed', `${call} failed with ${errno}: ${bytes} bytes.`, {
    details: { call, errno },
  })
}
