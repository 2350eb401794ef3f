// Owns waking a thread that sleeps on file descriptors: an eventfd that another thread writes to.

import koffi from 'koffi'
import { LatticeError } from '../errors.ts'

const EFD_CLOEXEC = 0o2000000
const EFD_NONBLOCK = 0o4000
const POLLIN = 1

const libc = koffi.load('libc.so.6')
const native = {
  eventfd: libc.func('eventfd', 'int', ['uint', 'int']),
  read: libc.func('read', 'int64_t', ['int', 'void *', 'size_t']),
  write: libc.func('write', 'int64_t', ['int', 'const void *', 'size_t']),
  poll: libc.func('poll', 'int', ['void *', 'uint64_t', 'int']),
  close: libc.func('close', 'int', ['int']),
}

const ONE = Uint8Array.of(1, 0, 0, 0, 0, 0, 0, 0)

export interface Bell {
  readonly fd: number
  /** Sleeps until the bell rings, `other` can be read, or the time is over. */
  wait(other: number, timeoutMs: number): void
  close(): void
}

/** @throws LatticeError `os_call_failed` if the process has no descriptor left */
export function openBell(): Bell {
  const fd: number = native.eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
  if (fd < 0) throw new LatticeError('os_call_failed', 'eventfd failed.')
  const pollfds = new DataView(new ArrayBuffer(16))
  pollfds.setInt32(0, fd, true)
  pollfds.setInt16(4, POLLIN, true)
  pollfds.setInt16(12, POLLIN, true)
  const bytes = new Uint8Array(pollfds.buffer)
  const count = new Uint8Array(8)
  return {
    fd,
    wait(other, timeoutMs) {
      pollfds.setInt32(8, other, true)
      native.poll(bytes, 2, timeoutMs)
      native.read(fd, count, 8)
    },
    close: () => void native.close(fd),
  }
}

/** Wakes who waits at a bell, or who is about to. Any thread may. */
export function ring(fd: number): void {
  native.write(fd, ONE, 8)
}
