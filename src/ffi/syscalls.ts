// Owns system calls that the C library has no function for, by number: io_uring, userfaultfd and
// the keyring. Numbers from the kernel's asm/unistd_64.h (x86-64) and asm-generic/unistd.h (arm64).

import koffi from 'koffi'

const libc = koffi.load('libc.so.6')
const words = Array.from({ length: 7 }, () => 'int64_t')

/** On failure -1, with errno. */
const nativeSyscall = libc.func('syscall', 'int64_t', words)
const nativeIoctl = libc.func('ioctl', 'int', ['int', 'uint64_t', 'void *'])
const nativeIoctlNumber = libc.func('ioctl', 'int', ['int', 'uint64_t', 'uint64_t'])

const arm = process.arch === 'arm64'

export const SYS = {
  addKey: arm ? 217 : 248,
  requestKey: arm ? 218 : 249,
  keyctl: arm ? 219 : 250,
  userfaultfd: arm ? 282 : 323,
  ioUringSetup: 425,
  ioUringEnter: 426,
} as const

export function syscall(number: number, a = 0, b = 0, c = 0, d = 0, e = 0, f = 0): number {
  return Number(nativeSyscall(number, a, b, c, d, e, f))
}

/** @param argument a struct that is read and written, or a number that is passed as it is */
export function ioctl(fd: number, request: number, argument: BigUint64Array | number): number {
  return typeof argument === 'number'
    ? nativeIoctlNumber(fd, request, argument)
    : nativeIoctl(fd, request, argument)
}

export function lastErrno(): number {
  return koffi.errno()
}

/** Where a typed array lies. It must stay referenced, and be off V8's heap (over 64 bytes). */
export function addressOf(array: ArrayBufferView): number {
  return Number(koffi.address(array))
}
