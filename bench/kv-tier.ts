// Owns the measurement of the disk tier with SmolLM2-135M's layout: how fast columns go out and
// come back against what the disk gives, io_uring against a pool of threads, and how long a touch
// of an absent page waits, against a handler in C.
//
//   node bench/kv-tier.ts [DIRECTORY] [GIB]

import { execFileSync, spawnSync } from 'node:child_process'
import { read as readCallback } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import koffi from 'koffi'
import { HostKvMemory } from '../src/backends/cpu/kv-memory.ts'
import { mapAnonymous, viewMemory } from '../src/ffi/libc.ts'
import { Uring } from '../src/ffi/uring.ts'
import { openFaults, registerFaults, unregisterFaults } from '../src/ffi/userfaultfd.ts'
import { layerMajor } from '../src/kv/layout.ts'
import { PagerHost } from '../src/tier/pager-host.ts'

const [directory = '/var/tmp', gib = '1'] = process.argv.slice(2)
const PAGE = 4096
const SEQUENCE_COLUMNS = 375
const ROUNDS = 4

const layout = layerMajor({ layers: 30, rowBytes: 768, maxTokens: 2048, pageBytes: PAGE })
const columns = layout.rangeBytes / PAGE
const columnBytes = layout.ranges * PAGE
const regions = Math.floor((Number(gib) * 2 ** 30) / (SEQUENCE_COLUMNS * columnBytes))
const bytes = regions * SEQUENCE_COLUMNS * columnBytes
const signal = new Int32Array(new SharedArrayBuffer(4))
let pager: PagerHost | undefined
const kv = new HostKvMemory(layout, regions, regions, {
  bytes,
  path: directory,
  signal: signal.buffer as SharedArrayBuffer,
  startPager: (start) => (pager = new PagerHost(start)),
})
const tier = kv.tier!
const memory = new Int32Array(viewMemory(kv.address, layout.slotBytes * regions))

const gbs = (ms: number) => `${(bytes / ms / 1e6).toFixed(2)} GB/s`
const word = (slot: number, range: number, column: number) =>
  (slot * layout.slotBytes + range * layout.rangeBytes + column * PAGE) / 4

function waitFor(tickets: Iterable<number>): void {
  const left = new Set(tickets)
  while (left.size > 0) {
    const seen = Atomics.load(signal, 0)
    for (const { ticket, error } of tier.poll()) {
      if (error) throw error
      left.delete(ticket)
    }
    if (left.size > 0) Atomics.wait(signal, 0, seen, 100)
  }
}

const placesOf = (region: number) =>
  Uint32Array.from({ length: SEQUENCE_COLUMNS }, (_, i) => region * SEQUENCE_COLUMNS + i)
const whole = (region: number) => ({ region, first: 0, end: SEQUENCE_COLUMNS })

for (let slot = 0; slot < regions; slot++) {
  for (let range = 0; range < layout.ranges; range++) {
    const at = word(slot, range, 0)
    memory.fill(slot + range + 1, at, at + (SEQUENCE_COLUMNS * PAGE) / 4)
  }
}

const { file } = tier
console.log(
  `${regions} sequences of 2,000 tokens, ${(bytes / 2 ** 20).toFixed(0)} MiB in columns of` +
    ` ${columnBytes / 1024} KiB; O_DIRECT ${file.direct}`,
)
// The other slots keep their regions; a load into one that was discarded is as into a new one.
for (let round = 0; round < ROUNDS; round++) {
  let start = performance.now()
  waitFor(Array.from({ length: regions }, (_, r) => tier.save(whole(r), placesOf(r))))
  const saveMs = performance.now() - start
  for (let r = 0; r < regions; r++) kv.discard(r, 0, columns)
  // Who reads second may find in the host's cache what the first has read: they take turns.
  const first = round % 2 === 1 ? fio() : undefined
  start = performance.now()
  waitFor(Array.from({ length: regions }, (_, r) => tier.load(whole(r), placesOf(r))))
  const loadMs = performance.now() - start
  console.log(`tier      save ${gbs(saveMs)}   load ${gbs(loadMs)}   fio read ${first ?? fio()}`)
  console.log(`disk only io_uring ${gbs(ringMs())}   4 threads of pread ${gbs(await poolMs())}`)
}
for (let slot = 0; slot < regions; slot++) {
  const last = word(slot, layout.ranges - 1, SEQUENCE_COLUMNS - 1)
  if (memory[last] !== slot + layout.ranges) throw new Error(`slot ${slot} came back changed`)
}

faults()
kv.close()
await pager!.terminate()

/** fio's sequential direct read of the same file. */
function fio(): string {
  const path = `/proc/${process.pid}/fd/${file.fd}`
  const args = ['--name=read', `--filename=${path}`, '--rw=read', '--bs=1m', '--direct=1']
  const job = [`--size=${bytes}`, '--ioengine=io_uring', '--iodepth=8', '--output-format=json']
  const { status, stdout } = spawnSync('fio', [...args, ...job], { encoding: 'utf8' })
  if (status !== 0) return 'is not installed, or failed'
  const report = JSON.parse(stdout) as { jobs: { read: { bw_bytes: number } }[] }
  return `${(report.jobs[0]!.read.bw_bytes / 1e9).toFixed(2)} GB/s`
}

/** The whole file in operations of 1 MiB, six at a time, as the pager reads it. */
function ringMs(): number {
  const ring = new Uring(64)
  const [size, depth] = [1 << 20, 6]
  const buffers = mapAnonymous(size * depth)
  const start = performance.now()
  let [next, done] = [0, 0]
  const begin = (slot: number) => {
    if (next >= bytes) return
    ring.read(file.fd, buffers + slot * size, Math.min(size, bytes - next), next, slot)
    next += size
  }
  for (let slot = 0; slot < depth; slot++) begin(slot)
  while (done < Math.ceil(bytes / size)) {
    ring.enter(1000)
    done += ring.drain((slot) => begin(slot))
  }
  const ms = performance.now() - start
  ring.close()
  return ms
}

/** The same through libuv's pool of four threads. */
async function poolMs(): Promise<number> {
  const read = promisify(readCallback)
  const size = 1 << 20
  const start = performance.now()
  let next = 0
  const reader = async () => {
    const buffer = new Uint8Array(viewMemory(mapAnonymous(size), size))
    while (next < bytes) {
      const at = next
      next += size
      await read(file.fd, buffer, 0, Math.min(size, bytes - at), at)
    }
  }
  await Promise.all([reader(), reader(), reader(), reader()])
  return performance.now() - start
}

function faults(): void {
  const slot = 0
  const places = placesOf(0)
  for (const warm of [true, false]) {
    const touch: number[] = []
    for (let i = 0; i < (warm ? 1 : 8); i++) {
      kv.discard(0, 0, columns)
      for (let c = 0; c < SEQUENCE_COLUMNS; c++) {
        const one = { region: 0, first: c, end: c + 1 }
        const ticket = tier.load(one, places.subarray(c, c + 1))
        const before = tier.faults
        const us = touchUs(slot, c)
        waitFor([ticket])
        // Some are there already when they are touched: asking for one takes that long.
        if (tier.faults > before) touch.push(us)
      }
    }
    if (!warm) report('touch of a column just asked for, TypeScript pager', touch)
  }
  const busy: number[] = []
  for (let i = 0; i < 60; i++) {
    kv.discard(0, 0, columns)
    const ticket = tier.load(whole(0), places)
    busy.push(touchUs(slot, SEQUENCE_COLUMNS - 1 - i))
    waitFor([ticket])
  }
  report('touch far ahead of a load that is under way', busy)
  const native = compiled()
  if (!native) return console.log('no gcc: no handler in C to compare with')
  const { fd } = openFaults()!
  native.start(
    fd,
    kv.fd,
    file.fd,
    kv.address,
    layout.slotBytes,
    layout.rangeBytes,
    PAGE,
    layout.ranges,
  )
  const inC: number[] = []
  for (let i = 0; i < 8; i++) {
    kv.discard(0, 0, columns)
    eachRange(slot, (address, length) => registerFaults(fd, address, length))
    for (let c = 0; c < SEQUENCE_COLUMNS; c++) inC.push(touchUs(slot, c))
    eachRange(slot, (address, length) => unregisterFaults(fd, address, length))
  }
  native.stop()
  report('the same touch, handler in C that does not decrypt', inC)
}

function eachRange(slot: number, act: (address: number, bytes: number) => void): void {
  for (let range = 0; range < layout.ranges; range++) {
    const at = kv.address + slot * layout.slotBytes + range * layout.rangeBytes
    act(at, SEQUENCE_COLUMNS * PAGE)
  }
}

function touchUs(slot: number, column: number): number {
  const at = word(slot, layout.ranges - 1, column)
  const start = performance.now()
  const value = memory[at]
  const us = (performance.now() - start) * 1000
  if (value === 0) throw new Error('a page read as zeros')
  return us
}

function report(name: string, us: number[]): void {
  const sorted = us.toSorted((a, b) => a - b)
  const at = (p: number) => sorted[Math.min(sorted.length - 1, Math.floor(p * sorted.length))]!
  const figures = [0.5, 0.9, 0.99].map((p) => `p${p * 100} ${at(p).toFixed(0)}`).join('  ')
  console.log(`${name}: ${figures} µs (${us.length})`)
}

function compiled() {
  const source = new URL('kv-tier-handler.c', import.meta.url).pathname
  const library = join(tmpdir(), `kv-tier-handler-${process.pid}.so`)
  try {
    execFileSync('gcc', ['-O2', '-shared', '-fPIC', '-pthread', '-o', library, source])
  } catch {
    return undefined
  }
  const loaded = koffi.load(library)
  const sizes = Array.from({ length: 5 }, () => 'uint64_t')
  return {
    start: loaded.func('handler_start', 'int', ['int', 'int', 'int', ...sizes]),
    stop: loaded.func('handler_stop', 'void', []),
  }
}
