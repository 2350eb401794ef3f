// Owns the times of a step's kernels, each kind by itself, beside the least that it could take.

import type { CudaForward } from '../backends/cuda/forward.ts'
import type { Lowering } from '../backends/cuda/lower.ts'
import type { StepShape } from '../backends/cuda/lower-context.ts'
import type { CudaDriver } from '../ffi/cuda.ts'
import { type Ceilings, floorUs, type StepWork } from './gpu-floors.ts'
import { type GpuBench, median } from './gpu-measure.ts'

export interface KernelTime {
  /** The node's kind, and its matrix without the block's number. */
  name: string
  /** How often it is in a step. */
  count: number
  us: number
  floorUs: number
}

const RUNS = 9
const WARM_RUNS = 2

/** A graph for each kind, of all of that kind; rows are those of the last step. */
export function profiled(
  driver: CudaDriver,
  { stream }: CudaForward,
  lowering: Lowering,
  shape: Omit<StepShape, 'stream'>,
  work: StepWork,
  ceilings: Ceilings,
): KernelTime[] {
  const commands = lowering.commandsFor(shape.tokens)
  const events = [driver.createEvent(true), driver.createEvent(true)] as const
  const times = [...new Set(commands.map(({ name }) => name))].map((name) => {
    const same = commands.filter((command) => command.name === name)
    driver.beginCapture(stream)
    for (const { run } of same) run({ ...shape, stream })
    const graph = driver.endCapture(stream)
    const executable = driver.instantiate(graph)
    const ms = Array.from({ length: WARM_RUNS + RUNS }, () => {
      driver.recordEvent(events[0], stream)
      driver.launchGraph(executable, stream)
      driver.recordEvent(events[1], stream)
      driver.synchronizeEvent(events[1])
      return driver.elapsedMs(...events)
    })
    driver.destroyExecutable(executable)
    driver.destroyGraph(graph)
    const count = same.length
    const floors = same.map(({ nodes }) => floorUs(work.of(nodes), ceilings))
    return {
      ...{ name, count, us: (median(ms.slice(WARM_RUNS)) / count) * 1e3 },
      floorUs: floors.reduce((sum, us) => sum + us, 0) / count,
    }
  })
  for (const event of events) driver.destroyEvent(event)
  return times
}

/** A row for each kind of kernel. */
export function rowKernels(times: readonly KernelTime[], of: string, row: GpuBench['row']): void {
  for (const { name, count, us, floorUs: floor } of times) {
    row(`${of}: ${count} × ${name}`, us, 'µs', floor, 'its bytes, or its operations')
  }
}
