// Owns how things are measured on a GPU: what a part of the bench is given, and medians of times.

import type { CudaDevice } from '../backends/cuda/device.ts'
import { Kernels } from '../backends/cuda/kernels.ts'
import { Matmuls } from '../backends/cuda/matmul.ts'
import type { Pager } from '../backends/cuda/pager.ts'
import type { ModuleCache } from '../backends/cuda/module-cache.ts'
import { loadCublasLt } from '../ffi/cublaslt.ts'
import { KernelLaunch } from '../ffi/kernel-launch.ts'

export interface GpuRow {
  part: string
  name: string
  value: number
  unit: string
  /** What it is to be compared with, in the same unit. */
  reference?: number
  /** What the reference is. */
  against?: string
}

export interface GpuBench {
  device: CudaDevice
  modules: ModuleCache
  pager: () => Pager
  /** A stream of the bench's own. */
  stream: number
  row: (name: string, value: number, unit: string, reference?: number, against?: string) => void
}

export function median(values: readonly number[]): number {
  return quantile(values, 0.5)
}

export function quantile(values: readonly number[], at: number): number {
  const sorted = values.toSorted((a, b) => a - b)
  return sorted[Math.min(sorted.length - 1, Math.floor(at * sorted.length))] ?? Number.NaN
}

/** Microseconds that a call takes on the CPU. */
export function microseconds(call: () => void): number {
  const start = process.hrtime.bigint()
  call()
  return Number(process.hrtime.bigint() - start) / 1e3
}

/** Milliseconds that queued work takes on the GPU: the median of repetitions. */
export function gpuMs({ device, stream }: GpuBench, repeat: number, queue: () => void): number {
  const { driver } = device
  const [start, end] = [driver.createEvent(true), driver.createEvent(true)]
  const times = Array.from({ length: repeat }, () => {
    driver.recordEvent(start, stream)
    queue()
    driver.recordEvent(end, stream)
    driver.synchronizeEvent(end)
    return driver.elapsedMs(start, end)
  })
  driver.destroyEvent(start)
  driver.destroyEvent(end)
  return median(times)
}

/** Fills memory with random bfloat16 numbers in ±1. */
export function randomBf16({ device, modules, stream }: GpuBench, at: number, count: number): void {
  const kernels = new Kernels(device, modules)
  const kinds = ['u64', 'u64', 'u32', 'f32'] as const
  const fill = new KernelLaunch(kernels.find('step.cu', 'fillRandom'), [...kinds])
  fill.setAll(at, count, 1, 1).grid(2048).threads(256)
  device.driver.launch(fill, stream)
  device.driver.synchronizeStream(stream)
  kernels.close()
}

/** TFLOP/s of the matrix library's best algorithm for a large product of random numbers. */
export function matrixCeiling(bench: GpuBench): number {
  const { device, modules, stream } = bench
  const { driver, info } = device
  const size = 8192
  const bytes = size * size * 2
  const memory = driver.allocate(3 * bytes)
  randomBf16(bench, memory, (2 * bytes) / 2)
  const matmuls = new Matmuls(driver, loadCublasLt(), info, modules.folder)
  const product = { m: size, k: size, stride: size, float32: false, accumulate: false }
  const [weight, x, out] = [memory, memory + bytes, memory + 2 * bytes]
  matmuls.tune(product, size, [weight], x, out)
  const ms = gpuMs(bench, 20, () => matmuls.run(product, size, size, weight, x, out, stream))
  matmuls.close()
  driver.free(memory)
  return (2 * size ** 3) / ms / 1e9
}
