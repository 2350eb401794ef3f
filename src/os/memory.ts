// Owns how much memory this process may use: what the machine has free, and what its cgroups (v1
// or v2, any ancestor) allow. Sources: proc(5), cgroups(7).

import { readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'

export interface MemoryBudget {
  /** Bytes that could be allocated now without swapping or being killed. */
  availableBytes: number
  /** What sets that bound: the machine's free memory or a cgroup's limit. */
  bound: 'machine' | 'cgroup'
  machineBytes: number
  /** The tightest cgroup limit, if any is below the machine's memory. */
  cgroupBytes: number | undefined
}

/** @param root where /proc and /sys are; tests give a folder of their own. */
export function memoryBudget(root = '/'): MemoryBudget {
  const meminfo = readFileSync(join(root, 'proc/meminfo'), 'utf8')
  const machineBytes = meminfoBytes(meminfo, 'MemTotal')
  const free = meminfoBytes(meminfo, 'MemAvailable')
  let availableBytes = free
  let cgroupBytes: number | undefined
  for (const { limit, used } of cgroupLimits(root)) {
    if (limit >= machineBytes) continue
    cgroupBytes = Math.min(limit, cgroupBytes ?? limit)
    availableBytes = Math.min(availableBytes, Math.max(0, limit - used))
  }
  const bound = availableBytes < free ? 'cgroup' : 'machine'
  return { availableBytes, bound, machineBytes, cgroupBytes }
}

function meminfoBytes(meminfo: string, field: string): number {
  const kib = new RegExp(`^${field}:\\s+(\\d+) kB$`, 'm').exec(meminfo)?.[1]
  return Number(kib ?? 0) * 1024
}

/** The limits of this process's cgroup and all above it. */
function* cgroupLimits(root: string): Generator<{ limit: number; used: number }> {
  const memberships = read(join(root, 'proc/self/cgroup')) ?? ''
  for (const line of memberships.trim().split('\n')) {
    const [, controllers, path = '/'] = line.split(':')
    const v2 = controllers === ''
    if (!v2 && !controllers?.split(',').includes('memory')) continue
    const mount = join(root, 'sys/fs/cgroup', v2 ? '' : 'memory')
    const names = v2
      ? { limit: 'memory.max', used: 'memory.current' }
      : { limit: 'memory.limit_in_bytes', used: 'memory.usage_in_bytes' }
    for (let at = path; ; at = dirname(at)) {
      const limit = Number(read(join(mount, at, names.limit)) ?? Number.NaN)
      const used = Number(read(join(mount, at, names.used)) ?? 0)
      // A v2 group without a limit says `max`, which is not a number.
      if (Number.isFinite(limit)) yield { limit, used }
      if (at === '/' || at === '.') break
    }
  }
}

function read(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8').trim()
  } catch {
    return undefined
  }
}
