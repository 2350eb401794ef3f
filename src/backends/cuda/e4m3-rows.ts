// Owns rows of e4m3 on the GPU: their quantising, and the room for one product's input and scales.

import type { CudaDriver } from '../../ffi/cuda.ts'
import { KernelLaunch } from '../../ffi/kernel-launch.ts'
import type { Model } from '../../model/model.ts'
import type { CudaDevice } from './device.ts'
import { e4m3Weights } from './e4m3.ts'
import type { KernelFinder } from './kernels.ts'
import type { Quantiser } from './weights.ts'

const BF16 = 2

/** Quantises rows, and has room for one product's input: a step's products follow each other. */
export class E4m3 implements Quantiser {
  readonly names: ReadonlySet<string>
  /** [rows, k] e4m3, and a bf16 for each row. */
  readonly x: number
  readonly scales: number
  /** [rows, hidden] bf16: a product that is added to the residual stream when it is scaled. */
  readonly raw: number
  private readonly driver: CudaDriver
  private readonly launch: KernelLaunch
  private readonly stream: number

  /**
   * @param rowsMax of a step's products, with what they are padded to
   * @throws LatticeError as `e4m3Weights` does
   */
  constructor(
    { driver, info }: CudaDevice,
    find: KernelFinder,
    model: Model,
    rowsMax: number,
    stream: number,
  ) {
    this.driver = driver
    this.names = e4m3Weights(model, info)
    this.stream = stream
    this.launch = quantiseLaunch(find, 8)
    const kMax = Math.max(...[...this.names].map((name) => model.tensors.get(name)?.shape[0] ?? 0))
    this.raw = driver.allocate(rowsMax * (kMax + model.config.hidden * BF16 + BF16))
    this.x = this.raw + rowsMax * model.config.hidden * BF16
    this.scales = this.x + rowsMax * kMax
  }

  rows(from: number, to: number, scales: number, rows: number, width: number): void {
    this.launch.setAll(from, to, scales, width).grid(rows).threads(rowThreads(width))
    this.driver.launch(this.launch, this.stream)
  }

  close(): void {
    this.driver.free(this.raw)
  }
}

/** Of rows of `width` bf16, whose address, e4m3, scales and width are its arguments. */
export function quantiseLaunch(find: KernelFinder, width: number): KernelLaunch {
  const kernel = find('quantise.cu', 'quantiseRows')
  return new KernelLaunch(kernel, ['u64', 'u64', 'u64', 'i32']).threads(rowThreads(width))
}

/** Threads that hold a row, up to four groups of 8 elements each. */
export function rowThreads(width: number): number {
  const groups = width / 8
  return Math.ceil(Math.max(Math.min(groups, 256), groups / 4) / 32) * 32
}
