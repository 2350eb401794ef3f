// Catches compute threads on CPUs that share a core, that are not ours, or that nobody pays for.

import assert from 'node:assert/strict'
import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { temporaryDirectory } from '../../test/support/temporary.ts'
import { computeCpus } from './cpus.ts'

const PLENTY = 1024

/** A machine whose CPUs have these siblings, by number. */
function machine(siblings: Record<number, string>): string {
  const root = temporaryDirectory('sys')
  for (const [cpu, list] of Object.entries(siblings)) {
    const folder = join(root, `sys/devices/system/cpu/cpu${cpu}/topology`)
    mkdirSync(folder, { recursive: true })
    writeFileSync(join(folder, 'thread_siblings_list'), `${list}\n`)
  }
  return root
}

/** Two cores of two threads, numbered as Intel machines do and as AMD machines do. */
const APART = { 0: '0,2', 1: '1,3', 2: '0,2', 3: '1,3' }
const TOGETHER = { 0: '0-1', 1: '0-1', 2: '2-3', 3: '2-3' }

test('two threads share a core while another core is free', () => {
  assert.deepEqual(computeCpus([0, 1, 2, 3], undefined, machine(APART), PLENTY), [0, 1])
  assert.deepEqual(computeCpus([0, 1, 2, 3], undefined, machine(TOGETHER), PLENTY), [0, 2])
  assert.deepEqual(computeCpus([0, 1, 2, 3], 2, machine(TOGETHER), PLENTY), [0, 2])
})

test('more threads than cores are refused, or not spread evenly', () => {
  assert.deepEqual(computeCpus([0, 1, 2, 3], 3, machine(TOGETHER), PLENTY), [0, 1, 2])
  assert.deepEqual(computeCpus([0, 1, 2, 3], 4, machine(APART), PLENTY), [0, 1, 2, 3])
})

test('a CPU is used that the affinity mask does not allow', () => {
  assert.deepEqual(computeCpus([1, 3], undefined, machine(TOGETHER), PLENTY), [1, 3])
  assert.deepEqual(computeCpus([2, 3], undefined, machine(TOGETHER), PLENTY), [2])
})

test('a cgroup quota of fewer CPUs is exceeded, or yields no thread at all', () => {
  assert.deepEqual(computeCpus([0, 1, 2, 3], undefined, machine({}), 3), [0, 1, 2])
  assert.deepEqual(computeCpus([0, 1, 2, 3], undefined, machine({}), 0), [0])
  // Who asks for more than the quota has been heard.
  assert.deepEqual(computeCpus([0, 1, 2, 3], 4, machine({}), 1), [0, 1, 2, 3])
})

test('more threads than CPUs are started', () => {
  assert.throws(() => computeCpus([0, 1], 3, machine({}), PLENTY), {
    code: 'usage',
    message: /3 threads .* 2 CPUs/,
  })
})

test('a machine that hides its topology has no CPUs', () => {
  assert.deepEqual(computeCpus([0, 5], undefined, machine({}), PLENTY), [0, 5])
})
