// Owns reading a file's beginning piece by piece: a source of bytes and a cursor over it that
// never reads past the end, and never asks for more memory than the file has bytes.

import { closeSync, fstatSync, openSync, readSync, statSync } from 'node:fs'
import { LatticeError } from '../errors.ts'

/** Bytes that can be read at any offset; a file, or memory in tests. */
export interface ByteSource {
  /** As errors name it. */
  readonly name: string
  readonly byteLength: number
  /** Fills `into` from `offset`; the caller asks only for what is there. */
  read(into: Uint8Array, offset: number): void
}

/** The bytes of `data` as a source. */
export function memorySource(name: string, data: Uint8Array): ByteSource {
  return {
    name,
    byteLength: data.byteLength,
    read: (into, offset) => into.set(data.subarray(offset, offset + into.byteLength)),
  }
}

/**
 * Opens a file for the time that `use` runs.
 * @throws LatticeError `model_not_found` when it is not there, is not a file or may not be read.
 */
export function withFile<T>(path: string, use: (source: ByteSource) => T): T {
  let descriptor: number
  try {
    // Asked before opening: opening a pipe would wait for somebody to write into it.
    if (!statSync(path).isFile()) throw notAFile(path)
    descriptor = openSync(path, 'r')
  } catch (thrown) {
    if (thrown instanceof LatticeError) throw thrown
    const { code } = thrown as NodeJS.ErrnoException
    throw new LatticeError('model_not_found', `Cannot open ${path}: ${reason(code)}.`, {
      todo: 'Check the path, or list the models that are here with `lattice ls`.',
      cause: thrown,
    })
  }
  try {
    return use({
      name: path,
      byteLength: fstatSync(descriptor).size,
      read: (into, offset) => readFully(descriptor, path, into, offset),
    })
  } finally {
    closeSync(descriptor)
  }
}

function notAFile(path: string): LatticeError {
  return new LatticeError('model_not_found', `${path} is not a file.`, {
    todo: 'Give a .gguf file or a directory with safetensors.',
  })
}

function reason(code: string | undefined): string {
  if (code === 'ENOENT') return 'there is no such file'
  if (code === 'EACCES') return 'you may not read it'
  return code ?? 'unknown reason'
}

function readFully(descriptor: number, path: string, into: Uint8Array, offset: number): void {
  for (let done = 0; done < into.byteLength;) {
    const count = readSync(descriptor, into, done, into.byteLength - done, offset + done)
    if (count === 0) {
      throw new LatticeError('model_not_found', `${path} became shorter while it was read.`, {
        todo: 'Wait until whatever writes the file is done.',
      })
    }
    done += count
  }
}

const FIRST_CHUNK_BYTES = 64 << 10
const MAX_CHUNK_BYTES = 8 << 20

/**
 * A window that slides over a source. `need(n)` guarantees n bytes at `at` in `bytes`, or calls
 * `truncated`. Chunks double, so small headers cost one small read and large ones few.
 */
export class Window {
  bytes: Buffer = Buffer.alloc(0)
  /** Index into `bytes` of the next byte. */
  at = 0
  readonly source: ByteSource
  private start = 0
  private chunkBytes = FIRST_CHUNK_BYTES

  constructor(source: ByteSource) {
    this.source = source
  }

  /** Offset in the source of the next byte. */
  get offset(): number {
    return this.start + this.at
  }

  /** Bytes between the next one and the end of the source. */
  get remaining(): number {
    return this.source.byteLength - this.offset
  }

  /** Whether `count` more bytes exist; if so they are in `bytes` from `at` on. */
  has(count: number): boolean {
    if (this.at + count <= this.bytes.byteLength) return true
    if (count > this.remaining) return false
    const offset = this.offset
    const size = Math.min(Math.max(count, this.chunkBytes), this.source.byteLength - offset)
    const bytes = Buffer.allocUnsafeSlow(size)
    this.source.read(bytes, offset)
    this.bytes = bytes
    this.start = offset
    this.at = 0
    this.chunkBytes = Math.min(this.chunkBytes * 2, MAX_CHUNK_BYTES)
    return true
  }
}
