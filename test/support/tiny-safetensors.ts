// Owns the writing of small safetensors files and directories for tests.

import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { temporaryDirectory } from './temporary.ts'

/** Shape in the file's order: the last dimension is contiguous. */
export interface TinySafeTensor {
  name: string
  shape: readonly number[]
  dtype?: 'F32' | 'F16' | 'BF16'
  data?: Uint8Array
}

const BYTES = { F32: 4, F16: 2, BF16: 2 } as const

/** The bytes of a safetensors file; tensors without data are zeros. */
export function encodeSafetensors(tensors: readonly TinySafeTensor[]): Buffer {
  const header: Record<string, unknown> = { __metadata__: { format: 'pt' } }
  const payloads: Uint8Array[] = []
  let offset = 0
  for (const { name, shape, dtype = 'BF16', data } of tensors) {
    const size = shape.reduce((product, dimension) => product * dimension, BYTES[dtype])
    header[name] = { dtype, shape, data_offsets: [offset, offset + size] }
    payloads.push(data ?? new Uint8Array(size))
    offset += size
  }
  return withHeader(JSON.stringify(header), Buffer.concat(payloads))
}

/** Any text as the header of a file. */
export function withHeader(header: string, data: Uint8Array): Buffer {
  const text = Buffer.from(header)
  const length = Buffer.alloc(8)
  length.writeBigUInt64LE(BigInt(text.byteLength))
  return Buffer.concat([length, text, data])
}

/**
 * Writes a model directory and returns its path.
 * @param files contents by name: bytes as they are, strings as text, the rest as JSON
 */
export function writeModelDirectory(files: Readonly<Record<string, unknown>>): string {
  const directory = join(temporaryDirectory('model'), 'tiny-model')
  mkdirSync(directory)
  for (const [name, contents] of Object.entries(files)) {
    const raw = typeof contents === 'string' || contents instanceof Uint8Array
    writeFileSync(join(directory, name), raw ? contents : JSON.stringify(contents))
  }
  return directory
}
