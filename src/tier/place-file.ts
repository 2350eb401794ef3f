// Owns the file that columns lie in while they are out of memory: allocated in full at the start,
// read and written past the page cache.

import { closeSync, constants, fstatSync, openSync, statfsSync, unlinkSync } from 'node:fs'
import { join } from 'node:path'
import { LatticeError } from '../errors.ts'
import { allocateFile } from '../ffi/libc.ts'

const STAT_BLOCK_BYTES = 512

export interface PlaceFile {
  fd: number
  path: string
  /** false: its file system only knows the page cache. */
  direct: boolean
  /** Its file system is memory itself. */
  tmpfs: boolean
}

/** Where temporary files are that may be large: unlike /tmp it is never memory (FHS 5.15). */
const DIRECTORY_DEFAULT = '/var/tmp'

const TMPFS_MAGIC = 0x01021994

/**
 * A file that nobody else can open, gone with this process.
 * @param path in whose directory it lies; /var/tmp unless given
 * @throws LatticeError `usage` if the disk has too little room, `os_call_failed`
 */
export function temporaryPlaces(bytes: number, path = DIRECTORY_DEFAULT): PlaceFile {
  const name = join(path, `.lattice-kv-${process.pid}-${Math.random().toString(36).slice(2)}`)
  const file = openPlaces(name, bytes, constants.O_CREAT | constants.O_EXCL)
  unlinkSync(name)
  return { ...file, path }
}

/** @param flags added to reading and writing. @throws as above */
export function openPlaces(path: string, bytes: number, flags: number): PlaceFile {
  let direct = true
  let fd: number
  try {
    fd = openSync(path, constants.O_RDWR | constants.O_DIRECT | flags, 0o600)
  } catch (thrown) {
    if ((thrown as NodeJS.ErrnoException).code !== 'EINVAL') throw unusable(path, thrown)
    direct = false
    // O_DIRECT is refused after the file was made.
    fd = openSync(path, constants.O_RDWR | (flags & ~constants.O_EXCL), 0o600)
  }
  try {
    reserve(fd, path, bytes)
  } catch (thrown) {
    closeSync(fd)
    if (flags & constants.O_EXCL) unlinkSync(path)
    throw thrown
  }
  return { fd, path, direct, tmpfs: statfsSync(path).type === TMPFS_MAGIC }
}

/** Looks before it allocates: a disk that is full to the last block hurts everyone on it. */
function reserve(fd: number, path: string, bytes: number): void {
  const { bavail, bsize } = statfsSync(path)
  const needed = Math.max(0, bytes - fstatSync(fd).blocks * STAT_BLOCK_BYTES)
  if (needed > bavail * bsize) {
    throw new LatticeError(
      'usage',
      `${path} would need ${needed} bytes more; its disk has ${bavail * bsize} free.`,
      { todo: 'Give --kv-offload a smaller size or a directory on another disk.' },
    )
  }
  allocateFile(fd, bytes)
}

function unusable(path: string, cause: unknown): LatticeError {
  const reason = cause instanceof Error ? cause.message : String(cause)
  return new LatticeError('os_call_failed', `${path} cannot be used for KV: ${reason}.`, {
    todo: 'Give --kv-offload SIZE:PATH a directory that can be written to.',
    cause,
  })
}
