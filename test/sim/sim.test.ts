// Catches sharing, eviction, preemption, aborts and failures that together give a wrong token, lose
// or keep memory, or leave a sequence behind; and a simulator that would not notice.

import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { planted, PLANTED_BUGS } from './planted.ts'
import { report } from './report.ts'
import { type Entry, shrink, simulate } from './simulate.ts'
import type { Coverage } from './world.ts'

const RANDOM_RUN_MS = 12_000
const TOOL = fileURLToPath(new URL('../../tools/sim.ts', import.meta.url))

test('an invariant breaks in one of a hundred seeds, or little that is rare happens', () => {
  const total: Partial<Coverage> = {}
  for (let seed = 0; seed < 100; seed++) {
    const { failure, coverage } = simulate({ seed, steps: 1000 })
    if (failure) assert.fail(report({ seed, steps: 1000 }))
    for (const [name, count] of Object.entries(coverage) as [keyof Coverage, number][]) {
      total[name] = (total[name] ?? 0) + count
    }
  }
  for (const [name, count] of Object.entries(total)) {
    assert.ok(count > 50, `${name} came only ${count} times`)
  }
})

test('an invariant breaks in a seed that nobody has tried', (t) => {
  const first = Math.floor(Math.random() * 2 ** 31)
  t.diagnostic(`from seed ${first} on`)
  const until = performance.now() + RANDOM_RUN_MS
  let seed = first
  for (; performance.now() < until; seed++) {
    const { failure } = simulate({ seed, steps: 2000 })
    if (failure) assert.fail(report({ seed, steps: 2000 }, 5000))
  }
  t.diagnostic(`${seed - first} seeds of 2000 steps`)
})

for (const bug of PLANTED_BUGS) {
  test(`a planted bug is overlooked: ${bug}`, (t) => {
    const parts = planted(bug)
    const needed = Array.from({ length: 20 }, (_, seed) => {
      const { failure, steps } = simulate({ seed, steps: 5000, parts })
      assert.match(String(failure), /invariant broken/, `seed ${seed} does not notice`)
      return steps
    }).toSorted((a, b) => a - b)
    t.diagnostic(`${bug}: found after ${needed[10]} steps (${needed[0]} to ${needed.at(-1)})`)
  })
}

test('one seed is two runs', () => {
  const [first, second]: Entry[][] = [[], []]
  const options = { seed: 5, steps: 1500 }
  assert.deepEqual(simulate(options, first), simulate(options, second))
  const described = (entries: Entry[] = []) =>
    entries.map(({ step, action }) => `${step} ${action.describe()}`)
  assert.ok((first?.length ?? 0) > 100)
  assert.deepEqual(described(first), described(second))
})

test('a failure is not cut short, or what is left of it does not fail', () => {
  const options = { seed: 3, steps: 5000, parts: planted('reuse before zero') }
  const { result, needed, all } = shrink(options, 5000)
  assert.match(String(result.failure), /invariant broken/)
  assert.ok(needed.length < all.length / 2, `${needed.length} of ${all.length} are left`)
  const text = report({ ...options, parts: planted('reuse before zero') }, 500)
  assert.match(text, /again: npm run sim -- --seed 3 --steps 5000/)
  assert.match(text, /step \d+: submit/)
})

test('the command misreads its options or hides how to run a seed again', async () => {
  const run = (...argv: string[]) => promisify(execFile)(process.execPath, [TOOL, ...argv])
  const { stdout } = await run('--seed', '7', '--seeds', '3', '--steps', '50', '--jobs', '2')
  assert.match(stdout, /seeds 7…9, 50 steps each, on 2 threads\nno invariant broken/)
  await assert.rejects(run('--steps', 'many'), { code: 2, stderr: /--steps is many; it must/ })
})
