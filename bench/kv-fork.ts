// Owns the measurement of a fork beneath the slots, with SmolLM2-135M's layout: time, bytes copied,
// memory added; and, for comparison, of one whose boundary page the kernel copies on write.
//
//   node bench/kv-fork.ts [TOKENS]

import koffi from 'koffi'
import { HostKvMemory } from '../src/backends/cpu/kv-memory.ts'
import { viewMemory } from '../src/ffi/libc.ts'
import { layerMajor } from '../src/kv/layout.ts'
import { fullColumns, RegionTable, regionsFor } from '../src/kv/regions.ts'
import { SlotTable } from '../src/kv/slots.ts'

const TOKENS = Number(process.argv[2] ?? 2048)
const FORKS = 64
const ROUNDS = 20
const PAGE = 4096
const MAP_PRIVATE_FIXED = 0x4012

const shape = { layers: 30, rowBytes: 768, maxTokens: 8192, pageBytes: PAGE }
const layout = layerMajor(shape)
const slots = FORKS + 1
const kv = new HostKvMemory(layout, slots, regionsFor(slots))
const table = new SlotTable(new RegionTable(layout, regionsFor(slots), 1e9, kv), slots)
const map = koffi
  .load('libc.so.6')
  .func('mmap', 'uintptr_t', ['uintptr_t', 'size_t', 'int', 'int', 'int', 'int64_t'])

function fill(slot: number, from: number, to: number): void {
  for (let layer = 0; layer < shape.layers; layer++) {
    const address = kv.address + slot * layout.slotBytes + layer * layout.rangeBytes
    const bytes = (to - from) * shape.rowBytes
    new Uint8Array(viewMemory(address + from * shape.rowBytes, bytes)).fill(7)
  }
}

function fork(tokens: number): number {
  const spans = table.spansOf(parent, tokens)
  table.pin(spans)
  return table.acquireShared(spans)
}

/** Puts private copies of the page where token `tokens` begins over a slot that has forked. */
function mapBoundaryPrivately(slot: number, tokens: number): void {
  const first = fullColumns(layout, tokens) * PAGE
  for (let layer = 0; layer < shape.layers; layer++) {
    const at = layer * layout.rangeBytes + first
    map(kv.address + slot * layout.slotBytes + at, PAGE, 3, MAP_PRIVATE_FIXED, kv.fd, at)
  }
}

const parent = table.acquire(TOKENS)
table.grow(parent, TOKENS)
fill(parent, 0, TOKENS)

interface Times {
  fork: number[]
  firstWrite: number[]
  release: number[]
}

/** @param tokens of the fork; the boundary page is copied unless they end with a page */
function measure(tokens: number, privately: boolean): Times {
  const times: Times = { fork: [], firstWrite: [], release: [] }
  for (let round = 0; round < ROUNDS; round++) {
    const children: number[] = []
    for (let i = 0; i < FORKS; i++) {
      const start = performance.now()
      // Rounded down to whole pages, the fork itself copies nothing: the private mapping will.
      const child = fork(privately ? wholePages(tokens) : tokens)
      if (privately) mapBoundaryPrivately(child, tokens)
      times.fork.push(performance.now() - start)
      children.push(child)
    }
    for (const child of children) {
      const start = performance.now()
      table.grow(child, tokens + 1)
      fill(child, tokens, tokens + 1)
      times.firstWrite.push(performance.now() - start)
    }
    for (const child of children) {
      const start = performance.now()
      table.retire(child, 0)
      times.release.push(performance.now() - start)
    }
    remap()
  }
  return times
}

/** Gives every slot a mapping of its own: one that has last round's already would cost nothing. */
function remap(): void {
  const slots = Array.from({ length: FORKS }, () => table.acquire(1))
  for (const slot of slots) table.retire(slot, 0)
  while (table.reclaim(Infinity) >= 0);
}

/** The most tokens, at most these, that end where a page ends. */
function wholePages(tokens: number): number {
  let whole = tokens
  while ((whole * shape.rowBytes) % PAGE !== 0) whole--
  return whole
}

function p50(values: number[]): string {
  const sorted = values.toSorted((a, b) => a - b)
  return `${((sorted[sorted.length >> 1] ?? 0) * 1000).toFixed(0)} µs`
}

function report(name: string, { fork, firstWrite, release }: Times): void {
  console.log(
    `${name.padEnd(44)} fork ${p50(fork)}, first write ${p50(firstWrite)}, end ${p50(release)}`,
  )
}

measure(TOKENS, false)
report(`${TOKENS} tokens, boundary copied`, measure(TOKENS, false))
report(`${TOKENS} tokens, boundary copied by the kernel`, measure(TOKENS, true))
report(`${wholePages(TOKENS)} tokens, nothing to copy`, measure(wholePages(TOKENS), false))
const before = kv.residentBytes()
const forks = Array.from({ length: FORKS }, () => fork(TOKENS))
const shared = kv.residentBytes()
for (const slot of forks) {
  table.grow(slot, TOKENS + 1)
  fill(slot, TOKENS, TOKENS + 1)
}
const diverged = kv.residentBytes()
const added = (bytes: number): string =>
  `${((100 * (bytes - before)) / before).toFixed(2)} % (${(bytes - before) >> 10} KiB)`
const copied = (TOKENS * shape.rowBytes - fullColumns(layout, TOKENS) * PAGE) * shape.layers
console.log(
  `${FORKS} forks add ${added(shared)} to ${before >> 10} KiB until they write, ` +
    `${added(diverged)} with their first token, for which each copies ${copied} bytes`,
)
kv.close()
