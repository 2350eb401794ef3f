// Owns what tests on a GPU share: an opened device, arrays there and back, outputs full of NaN
// before a kernel writes them, and the comparison with a float64 reference.

import assert from 'node:assert/strict'
import { CudaDevice } from '../../src/backends/cuda/device.ts'
import { Kernels } from '../../src/backends/cuda/kernels.ts'
import { ModuleCache } from '../../src/backends/cuda/module-cache.ts'
import { addressOf } from '../../src/ffi/block.ts'
import { FUNCTION } from '../../src/ffi/cuda.ts'
import { type ArgumentKind, KernelLaunch } from '../../src/ffi/kernel-launch.ts'
import { Random } from '../support/random.ts'

/** Relative error, root mean square, that bf16 explains. */
export const BF16_ERROR = 1e-2

/** Shared memory that a block has without asking, but for what may be static. */
const UNASKED_BYTES = 40 << 10

export class Gpu implements Disposable {
  readonly device = CudaDevice.open()
  readonly modules = new ModuleCache()
  readonly kernels = new Kernels(this.device, this.modules)
  readonly stream: number
  private readonly allocations: number[] = []

  constructor() {
    this.stream = this.driver.createStream()
  }

  get driver() {
    return this.device.driver
  }

  /** An array on the device with this content. */
  put(content: ArrayBufferView): number {
    const address = this.driver.allocate(Math.max(16, content.byteLength))
    this.allocations.push(address)
    this.driver.copyToDevice(address, addressOf(content), content.byteLength, this.stream)
    this.driver.synchronizeStream(this.stream)
    return address
  }

  /** Room for `bytes`, every bf16 and float32 of it NaN. */
  poisoned(bytes: number): number {
    return this.put(new Uint8Array(bytes).fill(0xff))
  }

  get<T extends ArrayBufferView>(address: number, into: T): T {
    this.driver.copyToHost(addressOf(into), address, into.byteLength, this.stream)
    this.driver.synchronizeStream(this.stream)
    return into
  }

  bf16(address: number, count: number): Float32Array {
    return fromBf16(this.get(address, new Uint16Array(count)))
  }

  /** Runs one kernel and waits for it. */
  run(
    file: string,
    name: string,
    kinds: string,
    args: readonly number[],
    grid: readonly [number, number?],
    threads: number,
    options: { shared?: number; defines?: Readonly<Record<string, number>> } = {},
  ): void {
    const kernel = this.kernels.find(file, name, options.defines ?? {})
    const launch = new KernelLaunch(kernel, argumentKinds(kinds))
    const { shared = 0 } = options
    if (shared > UNASKED_BYTES) {
      this.driver.setFunctionAttribute(kernel, FUNCTION.dynamicSharedBytesMax, shared)
    }
    launch
      .grid(...grid)
      .threads(threads)
      .sharedBytes(shared)
    this.driver.launch(launch.setAll(...args), this.stream)
    this.driver.synchronizeStream(this.stream)
  }

  [Symbol.dispose](): void {
    for (const address of this.allocations) this.driver.free(address)
    this.driver.destroyStream(this.stream)
    this.kernels.close()
    this.device.close()
  }
}

/** a: address, i: int32, f: float32. */
function argumentKinds(kinds: string): ArgumentKind[] {
  return Array.from(kinds, (c) => (c === 'a' ? 'u64' : c === 'i' ? 'i32' : 'f32'))
}

export function toBf16(values: ArrayLike<number>): Uint16Array {
  const bits = new Uint32Array(new Float32Array(values).buffer)
  const narrow = new Uint16Array(bits.length)
  for (let i = 0; i < bits.length; i++) {
    const b = bits[i]!
    narrow[i] = (b + 0x7fff + ((b >>> 16) & 1)) >>> 16
  }
  return narrow
}

export function fromBf16(values: Uint16Array): Float32Array {
  const bits = new Uint32Array(values.length)
  for (let i = 0; i < bits.length; i++) bits[i] = values[i]! << 16
  return new Float32Array(bits.buffer)
}

/** Numbers about normally distributed, as bf16 has them. */
export function randomBf16(random: Random, count: number, scale = 1): Float32Array {
  const values = new Float32Array(count)
  for (let i = 0; i < count; i++) {
    const sum = random.next() + random.next() + random.next() + random.next() - 2
    values[i] = sum * 1.732 * scale
  }
  return fromBf16(toBf16(values))
}

/** Fails unless ‖got − want‖ ≤ tolerance·‖want‖ and every element is a number. */
export function close(
  got: ArrayLike<number>,
  want: ArrayLike<number>,
  tolerance: number,
  what: string,
): void {
  assert.equal(got.length, want.length, what)
  let error = 0
  let norm = 0
  for (let i = 0; i < want.length; i++) {
    error += (got[i]! - want[i]!) ** 2
    norm += want[i]! ** 2
  }
  const relative = Math.sqrt(error / norm)
  assert.ok(relative <= tolerance, `${what}: relative error ${relative}`)
}

export { Random }
