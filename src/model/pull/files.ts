// Owns making files durable and whole: hashes, and the rename that turns a partial file into one.

import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { open, rename, rm, statfs } from 'node:fs/promises'
import { dirname } from 'node:path'
import { LatticeError } from '../../errors.ts'
import { formatBytes } from './progress.ts'

/** A file that was fetched or found. */
export interface FetchedFile {
  path: string
  byteLength: number
  sha256: string
}

/** SHA-256 of a file in lower-case hex. */
export async function sha256File(path: string): Promise<string> {
  const hash = createHash('sha256')
  for await (const chunk of createReadStream(path, { highWaterMark: 1 << 20 })) hash.update(chunk)
  return hash.digest('hex')
}

/**
 * Checks a partial file and gives it its name: after this it is whole, also after a power cut.
 * @throws LatticeError `hash_mismatch`; then the partial file is gone
 */
export async function complete(
  partial: string,
  path: string,
  expected: string | undefined,
): Promise<FetchedFile> {
  const sha256 = await sha256File(partial)
  if (expected !== undefined && expected.toLowerCase() !== sha256) {
    await rm(partial, { force: true })
    throw new LatticeError(
      'hash_mismatch',
      `${path} has the SHA-256 ${sha256}, but ${expected.toLowerCase()} was expected.`,
      {
        todo: 'The download was removed. Try again; if it repeats, the source has changed.',
        details: { expected: expected.toLowerCase(), actual: sha256 },
      },
    )
  }
  const file = await open(partial, 'r')
  const { size } = await file.stat()
  await file.sync()
  await file.close()
  await rename(partial, path)
  await syncDirectory(dirname(path))
  return { path, byteLength: size, sha256 }
}

async function syncDirectory(path: string): Promise<void> {
  const directory = await open(path, 'r')
  await directory.sync()
  await directory.close()
}

/** Fails before a transfer that cannot fit, rather than in its middle. */
export async function needSpace(directory: string, bytes: number): Promise<void> {
  const { bavail, bsize } = await statfs(directory)
  if (bavail * bsize >= bytes) return
  const free = formatBytes(bavail * bsize)
  throw new LatticeError(
    'download_failed',
    `${directory} has ${free} free, and ${formatBytes(bytes)} are needed.`,
    { todo: 'Free some space, or put the store elsewhere with LATTICE_HOME.' },
  )
}
