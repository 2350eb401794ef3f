// Owns tensor structs in memory that TypeScript can write: ggml's functions create and check them
// once, and between steps their sizes and addresses are changed in place, which costs a store
// each where a call would cost fifty.

import { assert } from '../../assert.ts'
import { FLAG_COMPUTE, type GgmlBase, loadBase, TENSOR } from '../../ffi/ggml.ts'
import { mapAnonymous, unmap, viewMemory } from '../../ffi/libc.ts'
import { GGML_TYPES, type GgmlType } from '../../model/ggml-types.ts'

/** An address of a `struct ggml_tensor`. 0 is none. */
export type Tensor = number

export const TYPE_F32 = 0
export const TYPE_F16 = 1
export const TYPE_I32 = 26
export const TYPE_I64 = 27

const HIGH = 2 ** 32

/** A ggml context whose tensors are also visible here as 32-bit words. */
export class TensorArena {
  readonly g: GgmlBase
  readonly context: number
  private readonly address: number
  private readonly bytes: number
  private readonly words: Uint32Array
  private readonly shape = new BigInt64Array(4)

  /** @param bytes room for the tensors and graphs, at most 2 GiB; touched only as used. */
  constructor(bytes: number) {
    this.g = loadBase()
    this.bytes = bytes
    this.address = mapAnonymous(bytes)
    this.words = new Uint32Array(viewMemory(this.address, bytes))
    this.context = this.g.ggml_init(bytes, this.address)
  }

  create(type: number, ne: readonly number[]): Tensor {
    for (let d = 0; d < ne.length; d++) this.shape[d] = BigInt(ne[d] ?? 1)
    return this.g.ggml_new_tensor(this.context, type, ne.length, this.shape)
  }

  createTyped(type: GgmlType, ne: readonly number[]): Tensor {
    return this.create(GGML_TYPES[type].id, ne)
  }

  /** Elements along dimension `d`. */
  setSize(tensor: Tensor, d: number, elements: number): void {
    this.words[this.index(tensor, TENSOR.ne + 8 * d)] = elements
  }

  /** Bytes from an element to the next along dimension `d`. */
  setStride(tensor: Tensor, d: number, bytes: number): void {
    const index = this.index(tensor, TENSOR.nb + 8 * d)
    this.words[index] = bytes % HIGH
    this.words[index + 1] = Math.floor(bytes / HIGH)
  }

  /** The sizes and byte strides of a tensor, all four dimensions. */
  setShape(tensor: Tensor, ne: readonly number[], nb: readonly number[]): void {
    for (let d = 0; d < 4; d++) {
      this.setSize(tensor, d, ne[d] ?? 1)
      this.setStride(tensor, d, nb[d] ?? nb[nb.length - 1] ?? 0)
    }
  }

  setData(tensor: Tensor, address: number): void {
    const index = this.index(tensor, TENSOR.data)
    this.words[index] = address % HIGH
    this.words[index + 1] = Math.floor(address / HIGH)
  }

  setSource(tensor: Tensor, i: number, source: Tensor): void {
    const index = this.index(tensor, TENSOR.sources + 8 * i)
    this.words[index] = source % HIGH
    this.words[index + 1] = Math.floor(source / HIGH)
  }

  setBuffer(tensor: Tensor, buffer: number): void {
    const index = this.index(tensor, TENSOR.buffer)
    this.words[index] = buffer % HIGH
    this.words[index + 1] = Math.floor(buffer / HIGH)
  }

  /** Whether graphs compute this node or pass over it. */
  setEnabled(tensor: Tensor, enabled: boolean): void {
    const index = this.index(tensor, TENSOR.flags)
    const flags = this.words[index] ?? 0
    this.words[index] = enabled ? flags | FLAG_COMPUTE : flags & ~FLAG_COMPUTE
  }

  data(tensor: Tensor): number {
    const index = this.index(tensor, TENSOR.data)
    return (this.words[index] ?? 0) + (this.words[index + 1] ?? 0) * HIGH
  }

  free(): void {
    this.g.ggml_free(this.context)
    unmap(this.address, this.bytes)
  }

  private index(tensor: Tensor, field: number): number {
    const offset = tensor - this.address + field
    assert(offset >= 0 && offset < this.bytes, 'the tensor is of this arena')
    return offset / 4
  }
}
