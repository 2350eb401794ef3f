// Catches a memory budget that overlooks a limit, wherever containers and init systems put it, and
// so gets the process killed; or that sees one where there is none.

import assert from 'node:assert/strict'
import { mkdirSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { test } from 'node:test'
import { temporaryDirectory } from '../../test/support/temporary.ts'
import { memoryBudget } from './memory.ts'

const GIB = 2 ** 30
const V2_MOUNT = '30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate'
const V1_MOUNTS =
  '31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n' +
  '32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n' +
  '35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory'
/** What v1 says when there is no limit: the largest multiple of the page size. */
const V1_NONE = '9223372036854771712'

/** A machine of 16 GiB with 12 free, with these files besides. */
function machine(files: Record<string, string>): string {
  const root = temporaryDirectory('proc')
  const meminfo = 'MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:   12582912 kB\n'
  for (const [path, text] of Object.entries({ 'proc/meminfo': meminfo, ...files })) {
    mkdirSync(dirname(join(root, path)), { recursive: true })
    writeFileSync(join(root, path), `${text}\n`)
  }
  return root
}

function v2(group: string, files: Record<string, string>): string {
  const below = Object.entries(files).map(([path, text]) => [`sys/fs/cgroup/${path}`, text])
  return machine({
    'proc/self/cgroup': `0::${group}`,
    'proc/self/mountinfo': V2_MOUNT,
    ...Object.fromEntries(below),
  })
}

const MACHINE = {
  availableBytes: 12 * GIB,
  bound: 'machine',
  machineBytes: 16 * GIB,
  cgroupBytes: undefined,
}

test('a machine without cgroups, or without limits, has one', () => {
  assert.deepEqual(memoryBudget(machine({})), MACHINE)
  assert.deepEqual(memoryBudget(v2('/user.slice', { 'user.slice/memory.max': 'max' })), MACHINE)
  const v1 = machine({
    'proc/self/cgroup': '4:memory:/\n0::/',
    'proc/self/mountinfo': V1_MOUNTS,
    'sys/fs/cgroup/memory/memory.limit_in_bytes': V1_NONE,
  })
  assert.deepEqual(memoryBudget(v1), MACHINE)
})

test('the limit of a v2 group, or what it uses already, is overlooked', () => {
  const root = v2('/app.slice/lattice.service', {
    'app.slice/lattice.service/memory.max': String(4 * GIB),
    'app.slice/lattice.service/memory.current': String(GIB),
  })
  const expected = { ...MACHINE, availableBytes: 3 * GIB, bound: 'cgroup', cgroupBytes: 4 * GIB }
  assert.deepEqual(memoryBudget(root), expected)
})

test('a tighter limit of a group above is overlooked', () => {
  const root = v2('/a/b/c', {
    'a/b/c/memory.max': String(8 * GIB),
    'a/b/memory.max': 'max',
    'a/memory.max': String(6 * GIB),
    'a/memory.current': String(5 * GIB),
  })
  const expected = { ...MACHINE, availableBytes: GIB, bound: 'cgroup', cgroupBytes: 6 * GIB }
  assert.deepEqual(memoryBudget(root), expected)
})

test('the least available counts, not the lowest limit', () => {
  const root = v2('/a/b', {
    'a/b/memory.max': String(2 * GIB),
    'a/b/memory.current': String(0),
    'a/memory.max': String(4 * GIB),
    'a/memory.current': String(3 * GIB),
  })
  const { availableBytes, cgroupBytes } = memoryBudget(root)
  assert.deepEqual([availableBytes, cgroupBytes], [GIB, 2 * GIB])
})

test('page cache that the kernel drops first counts as used', () => {
  const root = v2('/a', {
    'a/memory.max': String(4 * GIB),
    'a/memory.current': String(3 * GIB),
    'a/memory.stat': `anon ${GIB}\ninactive_anon 7\nactive_file 0\ninactive_file ${2 * GIB}`,
  })
  assert.equal(memoryBudget(root).availableBytes, 3 * GIB)
})

test('a group that is over its limit has less than nothing', () => {
  const root = v2('/a', { 'a/memory.max': String(GIB), 'a/memory.current': String(2 * GIB) })
  assert.equal(memoryBudget(root).availableBytes, 0)
})

test("a container whose namespace's root is '/' does not read the limit at the mount's top", () => {
  const limit = { 'memory.max': String(2 * GIB), 'memory.current': '0' }
  assert.equal(memoryBudget(v2('/', limit)).cgroupBytes, 2 * GIB)
})

test('a v1 limit is looked for where v2 keeps its own', () => {
  const root = machine({
    'proc/self/cgroup': '12:cpu,cpuacct:/x\n4:memory:/user/app\n0::/',
    'proc/self/mountinfo': V1_MOUNTS,
    'sys/fs/cgroup/memory/memory.limit_in_bytes': V1_NONE,
    'sys/fs/cgroup/memory/user/memory.limit_in_bytes': String(5 * GIB),
    'sys/fs/cgroup/memory/user/memory.usage_in_bytes': String(2 * GIB),
    'sys/fs/cgroup/memory/user/memory.stat': `cache 1\ntotal_inactive_file ${GIB}`,
    'sys/fs/cgroup/memory/user/app/memory.limit_in_bytes': V1_NONE,
  })
  const expected = { ...MACHINE, availableBytes: 4 * GIB, bound: 'cgroup', cgroupBytes: 5 * GIB }
  assert.deepEqual(memoryBudget(root), expected)
})

test("a container on v1 that sees its host's paths finds no limit", () => {
  // The mount shows the container's own group as its top, /proc/self/cgroup the host's path to it.
  const files = {
    'proc/self/mountinfo':
      '35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory',
    'sys/fs/cgroup/memory/memory.limit_in_bytes': String(3 * GIB),
    'sys/fs/cgroup/memory/job/memory.limit_in_bytes': String(GIB),
  }
  const top = machine({ ...files, 'proc/self/cgroup': '4:memory:/docker/abc' })
  assert.equal(memoryBudget(top).cgroupBytes, 3 * GIB)
  const below = machine({ ...files, 'proc/self/cgroup': '4:memory:/docker/abc/job' })
  assert.equal(memoryBudget(below).cgroupBytes, GIB)
  const beside = machine({ ...files, 'proc/self/cgroup': '4:memory:/docker/abcd' })
  assert.equal(memoryBudget(beside).cgroupBytes, 3 * GIB)
})

test('on a hybrid machine the half that has the memory controller is not found', () => {
  const hybrid = `${V1_MOUNTS}\n41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw`
  const v1 = machine({
    'proc/self/cgroup': '4:memory:/app\n0::/system',
    'proc/self/mountinfo': hybrid,
    'sys/fs/cgroup/memory/app/memory.limit_in_bytes': String(2 * GIB),
  })
  assert.equal(memoryBudget(v1).cgroupBytes, 2 * GIB)
  const unified = machine({
    'proc/self/cgroup': '1:name=systemd:/system\n0::/system',
    'proc/self/mountinfo': hybrid.split('\n').toSpliced(2, 1).join('\n'),
    'sys/fs/cgroup/unified/system/memory.max': String(3 * GIB),
  })
  assert.equal(memoryBudget(unified).cgroupBytes, 3 * GIB)
})

test('this very machine cannot be read', () => {
  const { availableBytes, machineBytes } = memoryBudget()
  assert.ok(machineBytes > 2 ** 28 && availableBytes >= 0 && availableBytes <= machineBytes)
})
