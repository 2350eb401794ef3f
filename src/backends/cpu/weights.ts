// Owns the model's weights as ggml tensors. Files are memory-mapped and used in place; matrices
// that this CPU multiplies faster in another layout (AMX tiles, interleaved rows) are repacked
// once, and products of one input are then joined into a single taller matrix.

import { closeSync, openSync } from 'node:fs'
import { assert, present } from '../../assert.ts'
import { LatticeError } from '../../errors.ts'
import { extraBufferTypes, type GgmlCpu } from '../../ffi/ggml.ts'
import { copyMemory, mapAnonymous, mapFile, unmap, viewMemory } from '../../ffi/libc.ts'
import { GGML_TYPES } from '../../model/ggml-types.ts'
import type { Model, TensorRef } from '../../model/model.ts'
import { type Tensor, TensorArena, TYPE_F32 } from './tensors.ts'

/** Float types multiply as fast from the file as from a copy: they are never repacked. */
const USED_IN_PLACE = new Set(['F32', 'F16', 'BF16'])

interface Repacked {
  tensor: Tensor
  bufferType: number
  parts: readonly TensorRef[]
}

interface Mapping {
  address: number
  bytes: number
}

export class Weights {
  /** Names of the repacked layouts in use, with the bytes in each. */
  readonly repackedBytes = new Map<string, number>()
  private readonly model: Model
  private readonly arena: TensorArena
  private readonly files: Mapping[]
  private readonly vectors: Mapping[] = []
  private readonly buffers: number[] = []
  private readonly pending: Repacked[] = []
  private readonly matrices = new Map<string, Tensor>()
  private readonly device: number
  private readonly bufferTypes: readonly number[]
  private readonly choices = new Map<string, number>()

  constructor(model: Model, cpu: GgmlCpu) {
    this.model = model
    this.arena = new TensorArena((model.tensors.size * 4 + 1024) * 512)
    this.files = model.files.map(({ path, byteLength }) => {
      const fd = openSync(path, 'r')
      const address = mapFile(fd, byteLength)
      closeSync(fd)
      return { address, bytes: byteLength }
    })
    const extra = extraBufferTypes(cpu)
    this.device = extra.device
    this.bufferTypes = extra.bufferTypes
  }

  /** A matrix whose rows are looked up by index, as the file has it. */
  table(name: string): Tensor {
    return this.mapped(this.reference(name))
  }

  /** A matrix to multiply with, in the layout that is fastest here. */
  matrix(name: string): Tensor {
    const known = this.matrices.get(name)
    if (known !== undefined) return known
    const reference = this.reference(name)
    const bufferType = this.bufferTypeFor(reference)
    const tensor =
      bufferType === 0 ? this.mapped(reference) : this.repacked([reference], bufferType)
    this.matrices.set(name, tensor)
    return tensor
  }

  /**
   * Several matrices with the same input as one, rows in the given order; undefined where their
   * types differ or they are used in place (joining those would copy the file).
   */
  joined(names: readonly string[]): Tensor | undefined {
    const parts = names.map((name) => this.reference(name))
    const first = present(parts[0], 'a matrix')
    const bufferType = this.bufferTypeFor(first)
    if (bufferType === 0 || parts.some((part) => part.type !== first.type)) return undefined
    if (parts.some((part) => this.bufferTypeFor(part) !== bufferType)) return undefined
    return this.repacked(parts, bufferType)
  }

  /** Whether ggml multiplies one row by another kernel than several: with all unquantised types. */
  multipliesInPairs(name: string): boolean {
    return ['F32', 'F16', 'BF16'].includes(this.reference(name).type)
  }

  /** Vectors one after another in float32, plus `offset`; in place if the file has them so. */
  vector(names: readonly string[], offset = 0): Tensor {
    const parts = names.map((name) => this.reference(name))
    const first = present(parts[0], 'a vector')
    if (parts.length === 1 && first.type === 'F32' && offset === 0) return this.mapped(first)
    const elements = parts.reduce((sum, part) => sum + (part.shape[0] ?? 0), 0)
    const values = this.float32(elements)
    let at = 0
    for (const part of parts) {
      for (const value of this.readFloats(part)) values.view[at++] = value + offset
    }
    const tensor = this.arena.create(TYPE_F32, [elements])
    this.arena.setData(tensor, values.address)
    return tensor
  }

  /** A float32 vector that is not in the file, such as rope divisors. */
  constant(values: ArrayLike<number>): Tensor {
    const copy = this.float32(values.length)
    copy.view.set(values)
    const tensor = this.arena.create(TYPE_F32, [values.length])
    this.arena.setData(tensor, copy.address)
    return tensor
  }

  /** Repacks what was asked for. Called once, when the program is lowered. */
  load(): void {
    const { g } = this.arena
    const bufferTypes = new Set(this.pending.map((item) => item.bufferType))
    for (const bufferType of bufferTypes) {
      const items = this.pending.filter((item) => item.bufferType === bufferType)
      const alignment = g.ggml_backend_buft_get_alignment(bufferType)
      const offsets: number[] = []
      let total = 0
      for (const { tensor } of items) {
        offsets.push(total)
        const size = g.ggml_backend_buft_get_alloc_size(bufferType, tensor)
        total += Math.ceil(size / alignment) * alignment
      }
      const buffer = g.ggml_backend_buft_alloc_buffer(bufferType, total)
      if (buffer === 0) {
        throw new LatticeError('backend_failed', `No memory for ${total} bytes of weights.`, {
          todo: 'Free memory or choose a smaller model.',
        })
      }
      this.buffers.push(buffer)
      const start = g.ggml_backend_buffer_get_base(buffer)
      items.forEach(({ tensor, parts }, i) => {
        g.ggml_backend_tensor_alloc(buffer, tensor, start + (offsets[i] ?? 0))
        this.fill(tensor, parts)
      })
      this.repackedBytes.set(g.ggml_backend_buft_name(bufferType), total)
    }
    this.pending.length = 0
  }

  free(): void {
    for (const buffer of this.buffers) this.arena.g.ggml_backend_buffer_free(buffer)
    for (const { address, bytes } of [...this.files, ...this.vectors]) unmap(address, bytes)
    this.arena.free()
  }

  private fill(tensor: Tensor, parts: readonly TensorRef[]): void {
    const { g } = this.arena
    const bytes = parts.reduce((sum, part) => sum + part.byteLength, 0)
    const first = present(parts[0], 'a part')
    if (parts.length === 1) {
      g.ggml_backend_tensor_set(tensor, this.address(first), 0, bytes)
      return
    }
    // Repacking takes a whole matrix at once: the parts meet in a scratch mapping first.
    const scratch = mapAnonymous(bytes)
    let at = scratch
    for (const part of parts) {
      copyMemory(at, this.address(part), part.byteLength)
      at += part.byteLength
    }
    g.ggml_backend_tensor_set(tensor, scratch, 0, bytes)
    unmap(scratch, bytes)
  }

  private repacked(parts: readonly TensorRef[], bufferType: number): Tensor {
    const first = present(parts[0], 'a part')
    const rows = parts.reduce((sum, part) => sum + (part.shape[1] ?? 1), 0)
    const tensor = this.arena.createTyped(first.type, [first.shape[0] ?? 1, rows])
    this.pending.push({ tensor, bufferType, parts })
    return tensor
  }

  private mapped(reference: TensorRef): Tensor {
    const tensor = this.arena.createTyped(reference.type, reference.shape)
    this.arena.setData(tensor, this.address(reference))
    return tensor
  }

  /** The first extra buffer type that can multiply with this matrix; 0 is plain memory. */
  private bufferTypeFor(reference: TensorRef): number {
    if (USED_IN_PLACE.has(reference.type)) return 0
    const key = `${reference.type} ${reference.shape.join('x')}`
    const known = this.choices.get(key)
    if (known !== undefined) return known
    const { g } = this.arena
    const weight = this.arena.createTyped(reference.type, reference.shape)
    // ggml decides by the operation it would run: 512 columns stand for any batch.
    const input = this.arena.create(TYPE_F32, [reference.shape[0] ?? 1, 512])
    const product = g.ggml_mul_mat(this.arena.context, weight, input)
    const choice = this.bufferTypes.find((bufferType) => {
      const probe = g.ggml_backend_buft_alloc_buffer(bufferType, 0)
      this.arena.setBuffer(weight, probe)
      const supported = g.ggml_backend_dev_supports_op(this.device, product)
      this.arena.setBuffer(weight, 0)
      if (probe !== 0) g.ggml_backend_buffer_free(probe)
      return supported
    })
    this.choices.set(key, choice ?? 0)
    return choice ?? 0
  }

  private reference(name: string): TensorRef {
    const reference = this.model.tensors.get(name)
    assert(reference, `tensor ${name} was checked when the model was opened`)
    return reference
  }

  private address(reference: TensorRef): number {
    const file = present(this.files[reference.file], 'the file of a tensor')
    return file.address + reference.offset
  }

  private float32(elements: number): { address: number; view: Float32Array } {
    const bytes = elements * 4
    const address = mapAnonymous(bytes)
    this.vectors.push({ address, bytes })
    return { address, view: new Float32Array(viewMemory(address, bytes)) }
  }

  private readFloats(reference: TensorRef): Iterable<number> {
    const elements = reference.shape.reduce((product, n) => product * n, 1)
    const bytes = elements * GGML_TYPES[reference.type].blockBytes
    const data = new DataView(viewMemory(this.address(reference), bytes))
    switch (reference.type) {
      case 'F32':
        return Array.from({ length: elements }, (_, i) => data.getFloat32(i * 4, true))
      case 'F16':
        return Array.from({ length: elements }, (_, i) => data.getFloat16(i * 2, true))
      case 'BF16': {
        const bits = new DataView(new ArrayBuffer(4))
        return Array.from({ length: elements }, (_, i) => {
          bits.setUint32(0, data.getUint16(i * 2, true) << 16)
          return bits.getFloat32(0)
        })
      }
      default:
        throw new LatticeError(
          'model_unsupported',
          `${reference.name} is a vector of type ${reference.type}.`,
          { todo: 'Vectors must be F32, F16 or BF16.' },
        )
    }
  }
}
