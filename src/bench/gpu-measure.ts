// Owns how things are measured on a GPU: what a part of the bench is given, and medians of times.

import type { CudaDevice } from '../backends/cuda/device.ts'
import type { Pager } from '../backends/cuda/pager.ts'
import type { ModuleCache } from '../backends/cuda/module-cache.ts'

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
