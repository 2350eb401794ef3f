// Owns which CPUs to compute on: those this process may use, one of each core's hardware threads
// (two of them share the units that matter here), no more than a cgroup quota pays for.

import { readFileSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { join } from 'node:path'
import { LatticeError } from '../errors.ts'

/**
 * @param allowed CPUs that the process may run on, ascending.
 * @param threads how many to choose; undefined chooses one for each core.
 * @param root where /sys is; tests give a folder of their own.
 * @throws LatticeError `usage` when more threads are asked for than CPUs are allowed.
 */
export function computeCpus(
  allowed: readonly number[],
  threads: number | undefined,
  root = '/',
  quota = availableParallelism(),
): number[] {
  if (threads !== undefined && threads > allowed.length) {
    throw new LatticeError(
      'usage',
      `${threads} threads were asked for; this process may use ${allowed.length} CPUs.`,
      { todo: 'Give fewer --threads.' },
    )
  }
  const seen = new Set<string>()
  const firsts: number[] = []
  const siblings: number[] = []
  for (const cpu of allowed) {
    const core = siblingsOf(cpu, root)
    if (seen.has(core)) siblings.push(cpu)
    else firsts.push(cpu)
    seen.add(core)
  }
  const count = threads ?? Math.max(1, Math.min(firsts.length, quota))
  return [...firsts, ...siblings].slice(0, count).sort((a, b) => a - b)
}

function siblingsOf(cpu: number, root: string): string {
  const topology = join(root, `sys/devices/system/cpu/cpu${cpu}/topology/thread_siblings_list`)
  try {
    return readFileSync(topology, 'utf8').trim()
  } catch {
    return String(cpu)
  }
}
