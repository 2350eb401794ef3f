// Owns one thread of a simulation over many seeds: it gets one after the other and answers each.

import { parentPort } from 'node:worker_threads'
import { simulate, type SimOptions } from './simulate.ts'
import type { Coverage } from './world.ts'

export interface SeedResult {
  seed: number
  steps: number
  failed: boolean
  coverage: Coverage
}

parentPort?.on('message', (options: SimOptions) => {
  const { steps, failure, coverage } = simulate(options)
  const result: SeedResult = { seed: options.seed, steps, failed: failure !== undefined, coverage }
  parentPort?.postMessage(result)
})
