// Owns waking a thread that sleeps on file descriptors: an eventfd that another thread writes to.

import koffi from 'koffi'
import { LatticeError } from '../errors.ts'

const EFD_CLOEXEC = 0o2000000
const EFD_NONBLOCK = 0o4000
const POLLIN = 1
/** Of the first struct pollfd. */
const REVENTS = 6

const libc = koffi.load('libc.so.6')
const native = {
  eventfd: libc.func('eventfd', 'int', ['uint', 'int']),
  read: libc.func('read', 'int64_t', ['int', 'void *', 'size_t']),
  write: libc.func('write', 'int64_t', ['int', 'const void *', 'size_t']),
  poll: libc.func('poll', 'int', ['void *', 'uint64_t', 'int']),
}

const ONE = Uint8Array.of(1, 0, 0, 0, 0, 0, 0, 0)

export interface Bell {
  readonly fd: number
  /** Sleeps until the bell rings, one of the others can be read, or the time is over. */
  wait(timeoutMs: number): void
}

/**
 * A bell is closed like any descriptor, once nobody rings it any more.
 * @param others descriptors whose news wake the sleeper too
 * @throws LatticeError `os_call_failed` if the process has no descriptor left
 */
export function openBell(others: readonly number[]): Bell {
  const fd: number = native.eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
  if (fd < 0) throw new LatticeError('os_call_failed', 'eventfd failed.')
  const awaited = [fd, ...others]
  const pollfds = new DataView(new ArrayBuffer(8 * awaited.length))
  awaited.forEach((descriptor, i) => {
    pollfds.setInt32(8 * i, descriptor, true)
    pollfds.setInt16(8 * i + 4, POLLIN, true)
  })
  const bytes = new Uint8Array(pollfds.buffer)
  const count = new Uint8Array(8)
  return {
    fd,
    wait(timeoutMs) {
      native.poll(bytes, awaited.length, timeoutMs)
      if (pollfds.getInt16(REVENTS, true) !== 0) native.read(fd, count, 8)
    },
  }
}

/** Wakes who waits at a bell, or who is about to. Any thread may. */
export function ring(fd: number): void {
  native.write(fd, ONE, 8)
}
