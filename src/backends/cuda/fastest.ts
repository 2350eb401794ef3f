// Owns the choice among ways to queue the same work: by the time that each takes the GPU, and by
// what its launches cost the CPU.

import type { CudaDriver } from '../../ffi/cuda.ts'

type Queue<Way> = (way: Way, stream: number) => void

const WARM_RUNS = 2
const TIMED_RUNS = 8

/** What a graph's launch costs the CPU for each of its parts that is no kernel; see `isKernels`. */
const OTHER_PART_MS = 2e-3

/**
 * After some tens of milliseconds a GPU full of matrix products draws more power than it may, and
 * slows down: then ways that cost less energy win. Those this near to the best are run so long.
 */
const ENDURING_MS = 120
const NEAR = 1.2
/** Between shorter ones a GPU is idle for long enough. */
const ENDURED_MS = 0.05

/**
 * The fastest of some ways, measured one after the other; undefined of none.
 * @param enduring whether what counts is the speed after a while, not that of a GPU that was idle
 */
export function fastest<Way>(
  driver: CudaDriver,
  ways: readonly Way[],
  queue: Queue<Way>,
  enduring = false,
): Way | undefined {
  const stream = driver.createStream()
  const events = [driver.createEvent(true), driver.createEvent(true)] as const
  const runMs = (way: Way, warmRuns: number, runs: number): number => {
    for (let run = 0; run < warmRuns; run++) queue(way, stream)
    driver.recordEvent(events[0], stream)
    for (let run = 0; run < runs; run++) queue(way, stream)
    driver.recordEvent(events[1], stream)
    driver.synchronizeEvent(events[1])
    return driver.elapsedMs(...events) / runs
  }
  let found = ways.map((way) => ({ way, ms: runMs(way, WARM_RUNS, TIMED_RUNS) }))
  const leastMs = Math.min(...found.map(({ ms }) => ms))
  if (enduring && leastMs >= ENDURED_MS) {
    const near = found.filter(({ ms }) => ms <= leastMs * NEAR)
    const runs = Math.ceil(ENDURING_MS / 2 / leastMs)
    found = near.map(({ way }) => ({ way, ms: runMs(way, runs, runs) }))
  }
  let best: { way: Way; ms: number } | undefined
  for (const { way, ms } of found) {
    const costMs = ms + (isKernels(driver, stream, way, queue) ? 0 : OTHER_PART_MS)
    if (!best || costMs < best.ms) best = { way, ms: costMs }
  }
  for (const event of events) driver.destroyEvent(event)
  driver.destroyStream(stream)
  return best?.way
}

function isKernels<Way>(driver: CudaDriver, stream: number, way: Way, queue: Queue<Way>): boolean {
  driver.beginCapture(stream)
  queue(way, stream)
  const graph = driver.endCapture(stream)
  const isKernels = driver.isKernels(graph)
  driver.destroyGraph(graph)
  return isKernels
}
