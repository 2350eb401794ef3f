// Owns the frame of `lattice bench gpu`: it opens the device and runs the parts.

import { CudaDevice } from '../backends/cuda/device.ts'
import { ModuleCache } from '../backends/cuda/module-cache.ts'
import { ThreadPager } from '../backends/cuda/pager.ts'
import { benchAttention } from './gpu-attention.ts'
import { benchDecodeSteps } from './gpu-decode.ts'
import { benchFp8 } from './gpu-fp8.ts'
import type { GpuBench, GpuRow } from './gpu-measure.ts'
import { benchMemory } from './gpu-memory.ts'
import { benchServe } from './gpu-serve.ts'
import { benchTiers } from './gpu-tiers.ts'

export interface GpuBenchReport {
  device: string
  driver_version: number
  rows: GpuRow[]
}

/** One file a part, `src/bench/gpu-NAME.ts`. */
export const GPU_PARTS: Readonly<Record<string, (bench: GpuBench) => void | Promise<void>>> = {
  attention: benchAttention,
  decode: benchDecodeSteps,
  fp8: benchFp8,
  memory: benchMemory,
  serve: benchServe,
  tiers: benchTiers,
}

/** Runs parts one after the other; `onRow` sees each row as it comes. */
export async function runGpuBench(
  parts: readonly string[],
  onRow: (row: GpuRow) => void,
): Promise<GpuBenchReport> {
  const device = CudaDevice.open()
  const { driver } = device
  const stream = driver.createStream()
  const modules = new ModuleCache()
  const rows: GpuRow[] = []
  for (const part of parts) {
    await GPU_PARTS[part]?.({
      device,
      modules,
      pager: () => new ThreadPager(device),
      stream,
      row(name, value, unit, reference, against) {
        const row: GpuRow = { part, name, value, unit }
        if (reference !== undefined) row.reference = reference
        if (against !== undefined) row.against = against
        rows.push(row)
        onRow(row)
      },
    })
  }
  // Not after an error: a GPU that does not go on would hold up the error's report.
  driver.destroyStream(stream)
  device.close()
  return { device: device.info.name, driver_version: driver.version, rows }
}
