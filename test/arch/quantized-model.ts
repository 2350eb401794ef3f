// Owns the rewriting of a golden model's matrices as Q4_0. The goldens that allow it have matrices
// that Q4_0 holds exactly, so the logits to expect stay the same; only then are matrices repacked
// and products of one input joined.

import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { temporaryDirectory } from '../support/temporary.ts'
import { GGML_TYPES } from '../../src/model/ggml-types.ts'
import type { Model, TensorRef } from '../../src/model/model.ts'

const { blockSize, blockBytes } = GGML_TYPES.Q4_0

/** The same model with Q4_0 matrices, in a file of its own; vectors become F32. */
export function quantized(model: Model): Model {
  const files = model.files.map(({ path }) => readFileSync(path))
  const pieces: Buffer[] = []
  const tensors = new Map<string, TensorRef>()
  let offset = 0
  for (const tensor of model.tensors.values()) {
    const values = floats(files[tensor.file]!, tensor)
    const matrix = tensor.shape.length === 2
    const data = matrix ? q4(values) : Buffer.from(values.buffer)
    const type = matrix ? 'Q4_0' : 'F32'
    tensors.set(tensor.name, { ...tensor, type, file: 0, offset, byteLength: data.byteLength })
    pieces.push(data, Buffer.alloc(-data.byteLength & 63))
    offset += data.byteLength + (-data.byteLength & 63)
  }
  const path = join(temporaryDirectory('quantized'), 'weights')
  writeFileSync(path, Buffer.concat(pieces))
  return { ...model, tensors, files: [{ path, byteLength: offset }] }
}

function floats(file: Buffer, { type, offset, byteLength }: TensorRef): Float32Array {
  const bytes = new Uint8Array(file.subarray(offset, offset + byteLength)).buffer
  return type === 'F16' ? new Float32Array(new Float16Array(bytes)) : new Float32Array(bytes)
}

/** Blocks of a half-precision scale and 32 numbers in [-8, 7], the low nibbles first. */
function q4(values: Float32Array): Buffer {
  const data = Buffer.alloc((values.length / blockSize) * blockBytes)
  for (let block = 0; block < values.length / blockSize; block++) {
    const numbers = values.subarray(block * blockSize, (block + 1) * blockSize)
    const scale = Math.min(...numbers) / -8
    const at = block * blockBytes
    new DataView(data.buffer, data.byteOffset).setFloat16(at, scale, true)
    for (let i = 0; i < 16; i++) {
      const [low, high] = [numbers[i]! / scale + 8, numbers[i + 16]! / scale + 8]
      if (!Number.isInteger(low) || !Number.isInteger(high)) throw new Error('Q4_0 is not exact')
      data[at + 2 + i] = low | (high << 4)
    }
  }
  return data
}
