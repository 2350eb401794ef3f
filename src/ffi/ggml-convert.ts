// Owns the conversion of tensors of any ggml type to bf16, by ggml's own functions.

import koffi from 'koffi'
import { join } from 'node:path'
import { assert } from '../assert.ts'
import { GGML_TYPES, type GgmlType } from '../model/ggml-types.ts'
import { NativeBlock } from './block.ts'
import { librariesFolder, loadBase } from './ggml.ts'

/** `to_float` in struct ggml_type_traits: name, block size, interleave, type size, quantized. */
const TO_FLOAT_OFFSET = 40

/** Elements that are floats at a time: a multiple of every type's block. */
const PIECE = 1 << 16

export interface Bf16Converter {
  /** Writes `elements` bf16 at `to`, of the elements of a type that lie at `from`. */
  convert(type: GgmlType, from: number, to: number, elements: number): void
  /** Writes `elements` float32 at `to`. */
  widen(type: GgmlType, from: number, to: number, elements: number): void
}

/** @throws LatticeError `backend_unavailable` if the package is not installed */
export function bf16Converter(): Bf16Converter {
  loadBase()
  const library = koffi.load(join(librariesFolder(), 'libggml-base.so'))
  const traits = library.func('ggml_get_type_traits', 'uintptr_t', ['int'])
  const toBf16 = library.func('ggml_fp32_to_bf16_row', 'void', [
    'uintptr_t',
    'uintptr_t',
    'int64_t',
  ])
  const copy = koffi
    .load('libc.so.6')
    .func('memcpy', 'uintptr_t', ['uintptr_t', 'uintptr_t', 'size_t'])
  const scratch = new NativeBlock(PIECE * 4)

  const widen = (type: GgmlType, from: number, to: number, elements: number): void => {
    if (type === 'F32') {
      copy(to, from, elements * 4)
      return
    }
    const address = Number(traits(GGML_TYPES[type].id))
    const toFloat: unknown = koffi.decode(address + TO_FLOAT_OFFSET, 'void *')
    assert(toFloat !== null, `ggml reads ${type}`)
    koffi.call(toFloat, TO_FLOAT, from, to, elements)
  }

  const convert = (type: GgmlType, from: number, to: number, elements: number): void => {
    const { blockSize, blockBytes } = GGML_TYPES[type]
    if (type === 'BF16') {
      copy(to, from, elements * 2)
      return
    }
    for (let done = 0; done < elements; done += PIECE) {
      const count = Math.min(PIECE, elements - done)
      widen(type, from + (done / blockSize) * blockBytes, scratch.address, count)
      toBf16(scratch.address, to + done * 2, count)
    }
  }
  return { convert, widen }
}

const TO_FLOAT = koffi.proto('void ggml_to_float(uintptr_t from, uintptr_t to, int64_t elements)')
