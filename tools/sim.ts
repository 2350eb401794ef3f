// Owns `npm run sim`: simulates the engine's core from one seed or many, and shows what fails.

import { once } from 'node:events'
import { availableParallelism } from 'node:os'
import { parseArgs } from 'node:util'
import { Worker } from 'node:worker_threads'
import { report } from '../test/sim/report.ts'
import type { SeedResult } from '../test/sim/worker.ts'

const USAGE = `usage: npm run sim -- [--seed N] [--steps M] [--seeds K] [--jobs J]

  --seed N    the first seed; without it one is drawn and printed
  --steps M   engine steps of each seed (10000)
  --seeds K   how many seeds, counting up from the first (1)
  --jobs J    threads, each with a seed at a time (one for each CPU)

The same seed and steps do the same on every machine. Exit code 1: a seed failed.
`
const REPORTS_MAX = 3
const PROGRESS_MS = 10_000

const { seed, steps, seeds, jobs } = options()
console.log(`seeds ${seed}…${seed + seeds - 1}, ${steps} steps each, on ${jobs} threads`)
const started = performance.now()
const failed: number[] = []
const totals: Record<string, number> = { steps: 0 }
let [next, done] = [0, 0]

const progress = setInterval(() => say(`${done} of ${seeds} seeds`), PROGRESS_MS)
await Promise.all(Array.from({ length: Math.min(jobs, seeds) }, () => work()))
clearInterval(progress)
say(failed.length === 0 ? 'no invariant broken' : `${failed.length} of ${seeds} seeds failed`)
const coverage = Object.entries(totals).map(([name, count]) => `${name} ${count}`)
console.log(`  ${coverage.join(' · ')}`)
for (const seed of failed.toSorted((a, b) => a - b).slice(0, REPORTS_MAX)) {
  console.log(`\n${report({ seed, steps })}`)
}
process.exitCode = failed.length === 0 ? 0 : 1

/** One thread's share: it asks for a seed as long as there are some. */
async function work(): Promise<void> {
  const worker = new Worker(new URL('../test/sim/worker.ts', import.meta.url))
  try {
    while (next < seeds) {
      const result = await ask(worker, seed + next++)
      done++
      if (result.failed) {
        failed.push(result.seed)
        console.log(`seed ${result.seed} failed`)
      }
      for (const [name, count] of Object.entries({ ...result.coverage, steps: result.steps })) {
        totals[name] = (totals[name] ?? 0) + count
      }
    }
  } finally {
    await worker.terminate()
  }
}

async function ask(worker: Worker, seed: number): Promise<SeedResult> {
  worker.postMessage({ seed, steps })
  // An error of the thread rejects this, too.
  const [result] = (await once(worker, 'message')) as [SeedResult]
  return result
}

function say(what: string): void {
  const seconds = (performance.now() - started) / 1000
  const rate = Math.round((totals['steps'] ?? 0) / seconds)
  console.log(`${what} after ${seconds.toFixed(1)} s: ${rate} steps/s`)
}

function options(): { seed: number; steps: number; seeds: number; jobs: number } {
  try {
    const option = { type: 'string' } as const
    const { values } = parseArgs({
      options: {
        ...{ seed: option, steps: option, seeds: option, jobs: option },
        help: { type: 'boolean', short: 'h' },
      },
    })
    if (values.help) {
      process.stdout.write(USAGE)
      process.exit(0)
    }
    return {
      seed: count('seed', values.seed ?? `${Math.floor(Math.random() * 2 ** 31)}`, 0),
      steps: count('steps', values.steps ?? '10000', 1),
      seeds: count('seeds', values.seeds ?? '1', 1),
      jobs: count('jobs', values.jobs ?? `${availableParallelism()}`, 1),
    }
  } catch (thrown) {
    process.stderr.write(`error: ${thrown instanceof Error ? thrown.message : ''}\n${USAGE}`)
    process.exit(2)
  }
}

function count(name: string, text: string, least: number): number {
  const number = Number(text)
  if (Number.isSafeInteger(number) && number >= least) return number
  throw new Error(`--${name} is ${text}; it must be a whole number from ${least} on.`)
}
