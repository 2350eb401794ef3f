// Owns calls into the C library: memory mappings, memfds and CPU affinity. Pointers are plain
// numbers (user addresses fit 2^47), lengths are bytes, failures are LatticeErrors with errno.

import { readSync, writeSync } from 'node:fs'
import { constants } from 'node:os'
import koffi from 'koffi'
import { LatticeError } from '../errors.ts'

const libc = koffi.load('libc.so.6')

const nativeMmap = libc.func('mmap', 'uintptr_t', [
  'uintptr_t',
  'size_t',
  'int',
  'int',
  'int',
  'int64_t',
])
const nativeMunmap = libc.func('munmap', 'int', ['uintptr_t', 'size_t'])
const nativeMemfdCreate = libc.func('memfd_create', 'int', ['str', 'uint'])
const nativeFtruncate = libc.func('ftruncate', 'int', ['int', 'int64_t'])
const nativeFallocate = libc.func('fallocate', 'int', ['int', 'int', 'int64_t', 'int64_t'])
const nativeClose = libc.func('close', 'int', ['int'])
const nativeMemcpy = libc.func('memcpy', 'uintptr_t', ['uintptr_t', 'uintptr_t', 'size_t'])
const nativePread = libc.func('pread', 'int64_t', ['int', 'uintptr_t', 'size_t', 'int64_t'])
const nativePwrite = libc.func('pwrite', 'int64_t', ['int', 'uintptr_t', 'size_t', 'int64_t'])
const nativePreadv = libc.func('preadv', 'int64_t', ['int', 'uintptr_t', 'int', 'int64_t'])
const nativePwritev = libc.func('pwritev', 'int64_t', ['int', 'uintptr_t', 'int', 'int64_t'])
const nativeMlock = libc.func('mlock', 'int', ['uintptr_t', 'size_t'])
const nativeMadvise = libc.func('madvise', 'int', ['uintptr_t', 'size_t', 'int'])
const nativeFlock = libc.func('flock', 'int', ['int', 'int'])
const nativeEventfd = libc.func('eventfd', 'int', ['uint', 'int'])
const nativeGetAffinity = libc.func('sched_getaffinity', 'int', ['int', 'size_t', 'void *'])

const PROT_READ = 1
const PROT_WRITE = 2
const MAP_SHARED = 0x01
const MAP_PRIVATE = 0x02
const MAP_FIXED = 0x10
const MAP_ANONYMOUS = 0x20
const MAP_NORESERVE = 0x4000
const MAP_POPULATE = 0x8000
const MAP_FAILED_LOW32 = 0xffffffff
const MFD_CLOEXEC = 1
const FALLOC_FL_KEEP_SIZE = 1
const FALLOC_FL_PUNCH_HOLE = 2

const EFD_CLOEXEC = 0o2000000
const HUGE_BYTES = 2 << 20
const MADV_HUGEPAGE = 14
const MADV_DONTDUMP = 16
const LOCK_EX_NB = 2 | 4

const errnoNames = new Map(
  Object.entries(constants.errno).map(([name, number]) => [number, name] as const),
)

export function errnoName(errno: number): string {
  return errnoNames.get(errno) ?? `errno ${errno}`
}

/** The error of a call that has just failed on this thread. */
export function failed(call: string, what: string): LatticeError {
  const name = errnoName(koffi.errno())
  return new LatticeError('os_call_failed', `${call} failed with ${name}: ${what}.`, {
    details: { call, errno: name },
  })
}

function isMapFailed(address: number | bigint): boolean {
  return BigInt.asUintN(32, BigInt(address)) === BigInt(MAP_FAILED_LOW32) && address > 2 ** 52
}

/** Zeroed private memory of `bytes`, populated by the kernel on first touch. */
export function mapAnonymous(bytes: number): number {
  const flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
  const address = nativeMmap(0, bytes, PROT_READ | PROT_WRITE, flags, -1, 0)
  if (isMapFailed(address)) throw failed('mmap', `${bytes} bytes of anonymous memory`)
  return address
}

/**
 * Zeroed private memory, of huge pages where the kernel has them: a disk then gets it in a few
 * pieces.
 */
export function mapHuge(bytes: number): { address: number; bytes: number } {
  const whole = Math.ceil(bytes / HUGE_BYTES) * HUGE_BYTES
  const from = mapAnonymous(whole + HUGE_BYTES)
  const address = Math.ceil(from / HUGE_BYTES) * HUGE_BYTES
  if (address > from) unmap(from, address - from)
  const after = from + HUGE_BYTES - address
  if (after > 0) unmap(address + whole, after)
  // Only advice: without huge pages it is slower and no less right.
  nativeMadvise(address, whole, MADV_HUGEPAGE)
  return { address, bytes: whole }
}

/** A whole open file, read-only. Reading past a later truncation raises SIGBUS: keep the file. */
export function mapFile(fd: number, bytes: number): number {
  const address = nativeMmap(0, bytes, PROT_READ, MAP_PRIVATE, fd, 0)
  if (isMapFailed(address)) throw failed('mmap', `${bytes} bytes of a file`)
  return address
}

/** Shares `bytes` of a memfd with this process, readable and writable. */
export function mapShared(fd: number, bytes: number): number {
  const flags = MAP_SHARED | MAP_NORESERVE
  const address = nativeMmap(0, bytes, PROT_READ | PROT_WRITE, flags, fd, 0)
  if (isMapFailed(address)) throw failed('mmap', `${bytes} bytes of a memfd`)
  return address
}

/** A ring that the kernel shares through a descriptor of its own. */
export function mapRing(fd: number, bytes: number, offset: number): number {
  const flags = MAP_SHARED | MAP_POPULATE
  const address = nativeMmap(0, bytes, PROT_READ | PROT_WRITE, flags, fd, offset)
  if (isMapFailed(address)) throw failed('mmap', `${bytes} bytes of a ring`)
  return address
}

/** Puts part of a memfd, shared, in place of what is mapped at an address. */
export function mapSharedAt(address: number, bytes: number, fd: number, offset: number): void {
  const flags = MAP_SHARED | MAP_NORESERVE | MAP_FIXED
  const mapped = nativeMmap(address, bytes, PROT_READ | PROT_WRITE, flags, fd, offset)
  if (isMapFailed(mapped)) throw failed('mmap', `${bytes} bytes of a memfd in place`)
}

/** Copies within a file, through `scratch`: no page faults, unlike between mappings of it. */
export function copyInFile(
  fd: number,
  to: number,
  from: number,
  bytes: number,
  scratch: number,
): void {
  if (nativePread(fd, scratch, bytes, from) !== bytes) throw failed('pread', `${bytes} bytes`)
  if (nativePwrite(fd, scratch, bytes, to) !== bytes) throw failed('pwrite', `${bytes} bytes`)
}

export function unmap(address: number, bytes: number): void {
  if (nativeMunmap(address, bytes) !== 0) throw failed('munmap', `${bytes} bytes`)
}

/** A sparse file in memory: addresses now, pages when written. */
export function createMemfd(name: string, bytes: number): number {
  const fd = nativeMemfdCreate(name, MFD_CLOEXEC)
  if (fd < 0) throw failed('memfd_create', name)
  if (nativeFtruncate(fd, bytes) !== 0) throw failed('ftruncate', `${bytes} bytes of ${name}`)
  return fd
}

/** Closes a descriptor that was opened here; Node only knows its own. */
export function closeFd(fd: number): void {
  if (nativeClose(fd) !== 0) throw failed('close', `descriptor ${fd}`)
}

/** Gives the pages of a file range back to the kernel; later reads see zeros. */
export function punchHole(fd: number, offset: number, bytes: number): void {
  const mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
  if (nativeFallocate(fd, mode, offset, bytes) !== 0) {
    throw failed('fallocate', `hole of ${bytes} bytes at ${offset}`)
  }
}

/** Allocates a file's first `bytes` on its disk. */
export function allocateFile(fd: number, bytes: number): void {
  if (nativeFallocate(fd, 0, 0, bytes) !== 0) throw failed('fallocate', `${bytes} bytes of a file`)
}

/** Reads from a file into `count` iovecs (address and length, 8 bytes each) that lie at `iovs`. */
export function readVector(
  fd: number,
  iovs: number,
  count: number,
  offset: number,
  bytes: number,
): void {
  if (nativePreadv(fd, iovs, count, offset) !== bytes) throw failed('preadv', `${bytes} bytes`)
}

/** Writes `count` iovecs that lie at `iovs` into a file. */
export function writeVector(
  fd: number,
  iovs: number,
  count: number,
  offset: number,
  bytes: number,
): void {
  if (nativePwritev(fd, iovs, count, offset) !== bytes) throw failed('pwritev', `${bytes} bytes`)
}

/** Keeps memory out of swap and out of core dumps. */
export function lockMemory(address: number, bytes: number): void {
  if (nativeMlock(address, bytes) !== 0) throw failed('mlock', `${bytes} bytes`)
  if (nativeMadvise(address, bytes, MADV_DONTDUMP) !== 0) throw failed('madvise', `${bytes} bytes`)
}

/** Takes the lock of an open file for as long as it is open; false if somebody else has it. */
export function lockFile(fd: number): boolean {
  return nativeFlock(fd, LOCK_EX_NB) === 0
}

/** A descriptor that can be read once somebody has signalled it. */
export function createEvent(): number {
  const fd = nativeEventfd(0, EFD_CLOEXEC)
  if (fd < 0) throw failed('eventfd', 'a descriptor')
  return fd
}

const eventWord = new BigUint64Array(1)

export function signalEvent(fd: number): void {
  eventWord[0] = 1n
  writeSync(fd, eventWord)
}

/** Waits for a signal, and takes all that came. */
export function takeEvent(fd: number): void {
  readSync(fd, eventWord)
}

export function copyMemory(to: number, from: number, bytes: number): void {
  nativeMemcpy(to, from, bytes)
}

/** Native memory as an ArrayBuffer, without a copy. The caller keeps the mapping alive. */
export function viewMemory(address: number, bytes: number): ArrayBuffer {
  return koffi.view(address, bytes)
}

/** CPUs this thread may run on, ascending. */
export function allowedCpus(): number[] {
  const mask = new Uint8Array(128)
  if (nativeGetAffinity(0, mask.length, mask) < 0) throw failed('sched_getaffinity', 'this thread')
  const cpus: number[] = []
  for (let cpu = 0; cpu < mask.length * 8; cpu++) {
    if (((mask[cpu >> 3] ?? 0) >> (cpu & 7)) & 1) cpus.push(cpu)
  }
  return cpus
}
