// Owns the arguments and the shape of one kernel's launches, laid out as the driver reads them, so
// that a launch is one call with four numbers and what changes between launches is one store.

import { assert } from '../assert.ts'
import { NativeBlock } from './block.ts'

/** u64 is also an address; bytes128 is a tensor map, which has to be encoded in place. */
export type ArgumentKind = 'u64' | 'i32' | 'u32' | 'f32' | 'bytes128'

/** CUlaunchConfig: 7 × uint32, then stream, attributes, count (cuda.h). */
const CONFIG = { bytes: 56, shared: 24, stream: 32, attributes: 40, attributeCount: 48 }
/** CUlaunchAttribute: id, padding, a union of 64 bytes. */
const ATTRIBUTE = { bytes: 72, value: 8, cooperative: 2, cluster: 4, programmatic: 6 }
const ATTRIBUTES_MAX = 3

export class KernelLaunch {
  /** The function of a loaded module. */
  readonly kernel: number
  readonly kinds: readonly ArgumentKind[]
  /** Where the driver finds CUlaunchConfig, and the array of pointers to arguments. */
  readonly configAddress: number
  readonly argumentsAddress: number
  private readonly block: NativeBlock
  private readonly offsets: readonly number[]
  private readonly attributesAt: number

  constructor(kernel: number, kinds: readonly ArgumentKind[]) {
    this.kernel = kernel
    this.kinds = kinds
    const pointers = CONFIG.bytes
    this.attributesAt = pointers + kinds.length * 8
    // A tensor map's address is a multiple of 64.
    let end = Math.ceil((this.attributesAt + ATTRIBUTES_MAX * ATTRIBUTE.bytes) / 64) * 64
    this.offsets = kinds.map((kind) => {
      if (kind === 'bytes128') end = Math.ceil(end / 64) * 64
      const at = end
      end += kind === 'bytes128' ? 128 : 8
      return at
    })
    this.block = new NativeBlock(end)
    this.configAddress = this.block.address
    this.argumentsAddress = this.block.address + pointers
    this.block.setNumber(CONFIG.attributes, this.block.address + this.attributesAt)
    this.offsets.forEach((offset, i) => {
      this.block.setNumber(pointers + i * 8, this.block.address + offset)
    })
    this.grid(1)
    this.threads(1)
  }

  grid(x: number, y = 1, z = 1): this {
    return this.three(0, x, y, z)
  }

  threads(x: number, y = 1, z = 1): this {
    return this.three(3, x, y, z)
  }

  /** Above 48 KiB, set the function's attribute `dynamicSharedBytesMax` first. */
  sharedBytes(bytes: number): this {
    this.block.u32[CONFIG.shared / 4] = bytes
    return this
  }

  /** Blocks of a cluster (compute capability 9.0 and later); the grid is a multiple of it. */
  cluster(x: number, y = 1, z = 1): this {
    const at = this.attribute(ATTRIBUTE.cluster)
    this.block.u32.set([x, y, z], at / 4)
    return this
  }

  /** All blocks run at once, so they may wait for each other; a grid that cannot is refused. */
  cooperative(): this {
    this.block.u32[this.attribute(ATTRIBUTE.cooperative) / 4] = 1
    return this
  }

  /**
   * Lets the kernel begin before its predecessor on the stream has ended (9.0 and later): it must
   * execute griddepcontrol.wait before it touches what the predecessor writes.
   */
  programmatic(): this {
    this.block.u32[this.attribute(ATTRIBUTE.programmatic) / 4] = 1
    return this
  }

  /** Sets argument `index`; addresses and counts up to 2^53. */
  set(index: number, value: number): this {
    const offset = this.offsets[index]
    const kind = this.kinds[index]
    assert(offset !== undefined && kind !== undefined, `argument ${index} exists`)
    assert(kind !== 'bytes128', 'a tensor map is encoded at addressOfArgument')
    if (kind === 'u64') this.block.setNumber(offset, value)
    else if (kind === 'f32') this.block.f32[offset / 4] = value
    else this.block.i32[offset / 4] = value
    return this
  }

  setAll(...values: readonly number[]): this {
    assert(values.length === this.kinds.length, 'every argument has a value')
    values.forEach((value, i) => this.set(i, value))
    return this
  }

  /** What `set` stored last. */
  get(index: number): number {
    const offset = this.offsets[index] ?? 0
    const kind = this.kinds[index]
    if (kind === 'u64') return this.block.number(offset)
    if (kind === 'f32') return this.block.f32[offset / 4] ?? 0
    return (kind === 'i32' ? this.block.i32 : this.block.u32)[offset / 4] ?? 0
  }

  addressOfArgument(index: number): number {
    return this.block.address + (this.offsets[index] ?? 0)
  }

  /** Where it runs; the driver's `launch` sets it. */
  set stream(stream: number) {
    this.block.setNumber(CONFIG.stream, stream)
  }

  get isProgrammatic(): boolean {
    const count = this.block.u32[CONFIG.attributeCount / 4] ?? 0
    const ids = Array.from({ length: count }, (_, i) => this.block.u32[this.attributeAt(i) / 4])
    return ids.includes(ATTRIBUTE.programmatic)
  }

  get dynamicSharedBytes(): number {
    return this.block.u32[CONFIG.shared / 4] ?? 0
  }

  /** Blocks in each dimension, then threads of a block in each. */
  get shape(): readonly number[] {
    return [...this.block.u32.subarray(0, 6)]
  }

  private three(at: number, x: number, y: number, z: number): this {
    this.block.u32[at] = x
    this.block.u32[at + 1] = y
    this.block.u32[at + 2] = z
    return this
  }

  /** @returns the offset of the value of a new attribute, or of one that is set already */
  private attribute(id: number): number {
    const count = this.block.u32[CONFIG.attributeCount / 4] ?? 0
    let index = 0
    while (index < count && this.block.u32[this.attributeAt(index) / 4] !== id) index++
    this.block.u32[this.attributeAt(index) / 4] = id
    this.block.u32[CONFIG.attributeCount / 4] = Math.max(count, index + 1)
    return this.attributeAt(index) + ATTRIBUTE.value
  }

  private attributeAt(index: number): number {
    return this.attributesAt + index * ATTRIBUTE.bytes
  }
}
