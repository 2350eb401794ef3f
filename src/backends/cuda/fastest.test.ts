// Catches a choice that is slow where it is used: after a while under load, or in what its launches
// cost the CPU.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { CudaDriver } from '../../ffi/cuda.ts'
import { fastest } from './fastest.ts'

interface Way {
  name: string
  /** Of a run, when the GPU has had so many milliseconds of work in a row. */
  ms: (busyMs: number) => number
  fills?: boolean
}

/** A GPU that is idle whenever somebody waits for it, and whose clock is the work it was given. */
function choose(ways: readonly Way[], enduring = false): { chosen: Way | undefined; ms: number } {
  let clockMs = 0
  let idleAtMs = 0
  let capturing = false
  let fills = false
  const recorded = new Map<number, number>()
  const driver = {
    createStream: () => 1,
    destroyStream() {},
    createEvent: () => recorded.set(recorded.size, 0).size - 1,
    destroyEvent() {},
    recordEvent: (event: number) => void recorded.set(event, clockMs),
    synchronizeEvent: () => void (idleAtMs = clockMs),
    elapsedMs: (from: number, to: number) => recorded.get(to)! - recorded.get(from)!,
    beginCapture: () => void (capturing = true),
    endCapture() {
      capturing = false
      return 1
    },
    isKernels: () => !fills,
    destroyGraph() {},
  } as unknown as CudaDriver
  const queue = (way: Way): void => {
    fills = way.fills ?? false
    if (!capturing) clockMs += way.ms(clockMs - idleAtMs)
  }
  return { chosen: fastest(driver, ways, queue, enduring), ms: clockMs }
}

const steady = (name: string, ms: number, fills = false): Way => ({ name, ms: () => ms, fills })

test('a way wins that is a little faster, but costs the CPU more than that', () => {
  const plain = steady('kernels', 0.1)
  assert.equal(choose([steady('fills', 0.099, true), plain]).chosen, plain)
  const faster = steady('fills', 0.09, true)
  assert.equal(choose([plain, faster]).chosen, faster)
})

test('a way wins that is the fastest only while the GPU is cool', () => {
  const hot: Way = { name: 'hot', ms: (busyMs) => (busyMs < 30 ? 0.5 : 0.7) }
  const cool = steady('cool', 0.55)
  assert.equal(choose([hot, cool]).chosen, hot)
  assert.equal(choose([hot, cool], true).chosen, cool)
})

test('what is far behind is run as long as what may win', () => {
  const { ms } = choose([steady('slow', 50), steady('fast', 1)], true)
  assert.ok(ms < 1000, `${ms} ms`)
})

test('short work is run for as long as work that heats a GPU', () => {
  const { ms } = choose([steady('one', 0.01), steady('other', 0.011)], true)
  assert.ok(ms < 1, `${ms} ms`)
})

test('a choice among nothing', () => {
  assert.equal(choose([]).chosen, undefined)
  assert.equal(choose([], true).chosen, undefined)
})
