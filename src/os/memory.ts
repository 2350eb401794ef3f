// Owns how much memory this process may use: what the machine has free, and what its cgroups (v1
// or v2, any ancestor) allow. Sources: proc(5), cgroups(7), the kernel's cgroup-v2 document.

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

interface Limit {
  limitBytes: number
  /** Without what the kernel would drop before it kills: page cache that nobody used lately. */
  usedBytes: number
}

interface MemoryFiles {
  limit: string
  used: string
  /** Key in memory.stat of page cache that is dropped first. */
  cache: string
}

const V1 = {
  limit: 'memory.limit_in_bytes',
  used: 'memory.usage_in_bytes',
  cache: 'total_inactive_file',
}
const V2 = { limit: 'memory.max', used: 'memory.current', cache: 'inactive_file' }

/** @param root where /proc and /sys are; tests give a folder of their own. */
export function memoryBudget(root = '/'): MemoryBudget {
  const meminfo = readFileSync(join(root, 'proc/meminfo'), 'utf8')
  const machineBytes = meminfoBytes(meminfo, 'MemTotal')
  const free = meminfoBytes(meminfo, 'MemAvailable')
  let availableBytes = free
  let cgroupBytes: number | undefined
  for (const { limitBytes, usedBytes } of cgroupLimits(root)) {
    if (limitBytes >= machineBytes) continue
    cgroupBytes = Math.min(limitBytes, cgroupBytes ?? limitBytes)
    availableBytes = Math.min(availableBytes, Math.max(0, limitBytes - usedBytes))
  }
  const bound = availableBytes < free ? 'cgroup' : 'machine'
  return { availableBytes, bound, machineBytes, cgroupBytes }
}

function meminfoBytes(meminfo: string, field: string): number {
  const kib = new RegExp(`^${field}:\\s+(\\d+) kB$`, 'm').exec(meminfo)?.[1]
  return Number(kib ?? 0) * 1024
}

/** The limits of this process's cgroups and of all above them, wherever they are mounted. */
function* cgroupLimits(root: string): Generator<Limit> {
  const memberships = (read(join(root, 'proc/self/cgroup')) ?? '').split('\n')
  for (const { mountPoint, shows, v2 } of cgroupMounts(root)) {
    const membership = memberships
      .map((line) => /^\d+:([^:]*):(.*)$/.exec(line))
      .find((line) => (v2 ? line?.[1] === '' : line?.[1]?.split(',').includes('memory')))
    if (!membership) continue
    const path = withinMount(membership[2] ?? '/', shows)
    for (let at = path; ; at = dirname(at)) {
      const limit = limitOf(join(root, mountPoint, at), v2 ? V2 : V1)
      if (limit) yield limit
      if (at === '/') break
    }
  }
}

interface CgroupMount {
  mountPoint: string
  /** The group that the mount shows as its top; not '/' in a container that shares namespaces. */
  shows: string
  v2: boolean
}

/** Mounts where a memory controller may be: all of v2, and v1's with `memory`. */
function cgroupMounts(root: string): CgroupMount[] {
  const lines = (read(join(root, 'proc/self/mountinfo')) ?? '').split('\n')
  return lines.flatMap((line) => {
    const [before = '', after = ''] = line.split(' - ')
    const [, , , shows = '/', mountPoint = '/'] = before.split(' ')
    const [type, , options = ''] = after.split(' ')
    const v2 = type === 'cgroup2'
    const v1Memory = type === 'cgroup' && options.split(',').includes('memory')
    return v2 || v1Memory ? [{ mountPoint, shows, v2 }] : []
  })
}

/** A group's path below the mount that shows `top`; outside of it only the mount's own is known. */
function withinMount(path: string, top: string): string {
  if (top === '/') return path
  if (path === top || path.startsWith(`${top}/`)) return path.slice(top.length) || '/'
  return '/'
}

function limitOf(folder: string, files: MemoryFiles): Limit | undefined {
  // A v2 group without a limit says `max`, which is not a number.
  const limitBytes = Number(read(join(folder, files.limit)) ?? Number.NaN)
  if (!Number.isFinite(limitBytes)) return undefined
  const used = Number(read(join(folder, files.used)) ?? 0)
  const stat = read(join(folder, 'memory.stat')) ?? ''
  const cache = Number(new RegExp(`^${files.cache} (\\d+)$`, 'm').exec(stat)?.[1] ?? 0)
  return { limitBytes, usedBytes: Math.max(0, used - cache) }
}

function read(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8').trim()
  } catch {
    return undefined
  }
}
