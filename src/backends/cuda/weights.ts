// Owns the model's weights on the GPU: matrices as bf16, or e4m3 with a scale a row, those that are
// multiplied with the same input behind each other as one; vectors (norms, biases) as float32.
// Loaded once, never changed.

import { closeSync, openSync, readSync } from 'node:fs'
import { assert, present } from '../../assert.ts'
import { LatticeError } from '../../errors.ts'
import type { CudaDriver } from '../../ffi/cuda.ts'
import { type Bf16Converter, bf16Converter } from '../../ffi/ggml-convert.ts'
import { viewMemory } from '../../ffi/libc.ts'
import { GGML_TYPES } from '../../model/ggml-types.ts'
import type { Model, TensorRef } from '../../model/model.ts'
import { isDummy } from '../../model/dummy.ts'
import type { Node, Norm } from './fuse.ts'

export interface Matrix {
  address: number
  rows: number
  /** Elements of a row. */
  k: number
  /** Of e4m3: the address of a bf16 for each row; 0 of a matrix of bf16. */
  scales: number
}

/** Which matrices are e4m3, and how rows of bf16 become that. */
export interface Quantiser {
  names: ReadonlySet<string>
  /** Queues the conversion of rows of `width` elements; addresses are the device's. */
  rows(from: number, to: number, scales: number, rows: number, width: number): void
}

/** Fills device memory with small random weights; see fillRandom in step.cu. */
export type RandomFill = (address: number, elements: number, seed: number, scale: number) => void

const BF16 = 2
/** Of a row of e4m3. */
const SCALE = 2
const ALIGNMENT = 256
const STAGING_BYTES = 32 << 20

export class DeviceWeights {
  readonly bytes: number
  private readonly driver: CudaDriver
  private readonly model: Model
  private readonly address: number
  private readonly matrices = new Map<string, Matrix>()
  private readonly vectors = new Map<string, number>()

  /** @param nodes say which matrices are joined, and which vectors there are */
  constructor(
    driver: CudaDriver,
    model: Model,
    nodes: readonly Node[],
    random: RandomFill,
    stream: number,
    quantiser?: Quantiser,
  ) {
    this.driver = driver
    this.model = model
    const groups = matrixGroups(nodes)
    const vectors = vectorNames(nodes)
    const narrow = (name: string) => quantiser?.names.has(name) ?? false
    const places = new Map<string, number>()
    const scales = new Map<string, number>()
    let bytes = 0
    // Without gaps between them.
    const lay = (
      names: readonly string[],
      into: Map<string, number>,
      of: (n: string) => number,
    ) => {
      bytes = Math.ceil(bytes / ALIGNMENT) * ALIGNMENT
      for (const name of names) {
        into.set(name, bytes)
        bytes += of(name)
      }
    }
    for (const group of groups) {
      lay(group, places, (n) => elementsOf(this.reference(n)) * (narrow(n) ? 1 : BF16))
      lay(group.filter(narrow), scales, (n) => rowsOf(this.reference(n)) * SCALE)
    }
    for (const name of vectors.keys()) lay([name], places, (n) => elementsOf(this.reference(n)) * 4)
    this.bytes = bytes
    const wide = groups
      .flat()
      .filter(narrow)
      .map((name) => elementsOf(this.reference(name)) * BF16)
    const staged = isDummy(model) ? Math.max(0, ...wide) : wide.length > 0 ? STAGING_BYTES : 0
    const { freeBytes } = driver.memoryInfo()
    if (bytes + staged > freeBytes) {
      throw new LatticeError(
        'backend_failed',
        `The weights need ${bytes + staged} bytes of GPU memory; ${freeBytes} are free.`,
        { todo: 'Choose a smaller model, or free memory of the GPU (see `nvidia-smi`).' },
      )
    }
    this.address = driver.allocate(bytes)
    const at = (place: number | undefined) => (place === undefined ? 0 : this.address + place)
    for (const name of groups.flat()) {
      const { shape } = this.reference(name)
      const address = at(present(places.get(name), name))
      const k = shape[0] ?? 1
      const scalesOf = at(scales.get(name))
      this.matrices.set(name, { address, rows: shape[1] ?? 1, k, scales: scalesOf })
    }
    for (const name of vectors.keys()) {
      this.vectors.set(name, at(present(places.get(name), name)))
    }
    const staging = staged > 0 ? driver.allocate(staged) : 0
    const upload = new Upload(driver, model, stream)
    for (const [name, { address, rows, k, scales: to }] of this.matrices) {
      // Only what is being converted is there as bf16, too.
      const from = to === 0 ? address : staging
      const convert = (done: number, count: number) =>
        quantiser?.rows(staging, address + done * k, to + done * SCALE, count, k)
      if (isDummy(model)) random(from, rows * k, seedOf(name), 0.02)
      else if (to === 0) upload.matrix(this.reference(name), address)
      else upload.rows(this.reference(name), staging, convert)
      if (isDummy(model) && to !== 0) convert(0, rows)
    }
    for (const [name, address] of this.vectors) {
      const offset = vectors.get(name) === 'norm' ? model.normWeightOffset : 0
      if (isDummy(model)) driver.fill32(address, ONE, elementsOf(this.reference(name)), stream)
      else upload.vector(this.reference(name), address, offset)
    }
    driver.synchronizeStream(stream)
    upload.close()
    if (staging !== 0) driver.free(staging)
  }

  /** Several matrices as one, rows in the given order: they lie so. */
  joined(names: readonly string[]): Matrix {
    const parts = names.map((name) => present(this.matrices.get(name), name))
    const first = present(parts[0], 'a matrix')
    const { address, k, scales } = first
    const bytes = scales === 0 ? BF16 : 1
    let rows = 0
    for (const part of parts) {
      assert(part.address === address + rows * k * bytes, 'joined matrices are neighbours')
      assert(part.scales === (scales === 0 ? 0 : scales + rows * SCALE), 'and so are their scales')
      rows += part.rows
    }
    return { address, rows, k, scales }
  }

  /** The address of a float32 vector; 0 for none. */
  vector(name: string | undefined): number {
    return name === undefined ? 0 : present(this.vectors.get(name), name)
  }

  close(): void {
    this.driver.free(this.address)
  }

  private reference(name: string): TensorRef {
    return present(this.model.tensors.get(name), `tensor ${name}, checked when it was opened,`)
  }
}

/** The bits of 1 as float32. */
const ONE = 0x3f800000

/** Reads tensors of files, converts them, and copies them to the GPU through pinned memory. */
class Upload {
  private readonly driver: CudaDriver
  private readonly stream: number
  private readonly files: number[]
  private readonly raw: { address: number; bytes: Uint8Array }
  private readonly converted: number
  private converter: Bf16Converter | undefined

  constructor(driver: CudaDriver, model: Model, stream: number) {
    this.driver = driver
    this.stream = stream
    this.files = model.files.map(({ path }) => openSync(path, 'r'))
    const address = driver.allocateHost(STAGING_BYTES)
    this.raw = { address, bytes: new Uint8Array(viewMemory(address, STAGING_BYTES)) }
    this.converted = driver.allocateHost(STAGING_BYTES)
  }

  matrix(reference: TensorRef, address: number): void {
    this.pieces(reference, BF16, 1, (elements, done) => {
      this.widened(reference, elements, address + done * BF16)
    })
  }

  /** Some rows at a time to the same memory; `take` queues what is to become of them. */
  rows(reference: TensorRef, address: number, take: (done: number, count: number) => void): void {
    const k = present(reference.shape[0], 'a row')
    this.pieces(reference, BF16, k, (elements, done) => {
      this.widened(reference, elements, address)
      take(done / k, elements / k)
    })
  }

  /** Copies what was read to the device, as bf16. */
  private widened({ type }: TensorRef, elements: number, address: number): void {
    const from = type === 'BF16' ? this.raw.address : this.converted
    if (type !== 'BF16') this.convert().convert(type, this.raw.address, this.converted, elements)
    this.driver.copyToDevice(address, from, elements * BF16, this.stream)
  }

  vector(reference: TensorRef, address: number, offset: number): void {
    this.pieces(reference, 4, 1, (elements, done) => {
      this.convert().widen(reference.type, this.raw.address, this.converted, elements)
      const values = new Float32Array(viewMemory(this.converted, elements * 4))
      for (let i = 0; offset !== 0 && i < elements; i++) values[i]! += offset
      this.driver.copyToDevice(address + done * 4, this.converted, elements * 4, this.stream)
    })
  }

  close(): void {
    this.driver.freeHost(this.raw.address)
    this.driver.freeHost(this.converted)
    for (const file of this.files) closeSync(file)
  }

  /**
   * Reads a tensor in pieces that fit both buffers; what each was queued to do is waited for.
   * @param unit elements that a piece has a multiple of
   */
  private pieces(
    { file, offset, type, shape }: TensorRef,
    elementBytes: number,
    unit: number,
    take: (elements: number, done: number) => void,
  ): void {
    const { blockSize, blockBytes } = GGML_TYPES[type]
    const blocks = shape.reduce((product, n) => product * n, 1) / blockSize
    const fitting = Math.floor(STAGING_BYTES / Math.max(blockBytes, blockSize * elementBytes))
    const most = fitting - (fitting % Math.max(1, unit / blockSize))
    for (let done = 0; done < blocks; done += most) {
      const count = Math.min(most, blocks - done)
      const descriptor = present(this.files[file], 'an open file')
      readFully(
        descriptor,
        this.raw.bytes.subarray(0, count * blockBytes),
        offset + done * blockBytes,
      )
      take(count * blockSize, done * blockSize)
      this.driver.synchronizeStream(this.stream)
    }
  }

  private convert(): Bf16Converter {
    return (this.converter ??= bf16Converter())
  }
}

function readFully(file: number, into: Uint8Array, offset: number): void {
  for (let done = 0; done < into.length;) {
    const read = readSync(file, into, done, into.length - done, offset + done)
    if (read === 0) {
      throw new LatticeError('backend_failed', 'A model file became shorter while it was read.', {
        todo: 'Wait until whatever writes the file is done.',
      })
    }
    done += read
  }
}

/** Matrices by neighbourhood: each is in one group, in its place. */
function matrixGroups(nodes: readonly Node[]): string[][] {
  const groups: string[][] = []
  const known = new Set<string>()
  const take = (names: readonly string[]) => {
    if (names.every((name) => known.has(name))) return
    groups.push([...names])
    for (const name of names) known.add(name)
  }
  for (const node of nodes) {
    if (node.kind === 'linear') take(node.weights)
    if (node.kind === 'embed' || node.kind === 'logits') take([node.weight])
  }
  return groups
}

function vectorNames(nodes: readonly Node[]): Map<string, 'norm' | 'bias'> {
  const names = new Map<string, 'norm' | 'bias'>()
  const norm = (of: Norm | undefined) => of && names.set(of.weight, 'norm')
  for (const node of nodes) {
    if (node.kind === 'norm') {
      norm(node.norm)
      norm(node.post)
    }
    if (node.kind === 'rope') {
      norm(node.q?.norm)
      norm(node.k?.norm)
    }
    if (node.kind === 'linear') {
      for (const bias of node.biases) if (bias !== undefined) names.set(bias, 'bias')
    }
  }
  return names
}

function rowsOf({ shape }: TensorRef): number {
  return shape[1] ?? 1
}

function elementsOf({ shape }: TensorRef): number {
  return shape.reduce((product, n) => product * n, 1)
}

/** The same weights for the same name, whatever the order. */
function seedOf(name: string): number {
  let hash = 0x811c9dc5
  for (const character of name) {
    hash = Math.imul(hash ^ (character.codePointAt(0) ?? 0), 0x01000193)
  }
  return hash >>> 0
}
