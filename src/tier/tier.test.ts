// Catches KV that comes back from disk as it did not go, or not at all: content, places, faults,
// damage, a memory that is reused too early. File, pager and faults are real.

import assert from 'node:assert/strict'
import { closeSync, openSync, readSync, writeSync } from 'node:fs'
import { test, type TestContext } from 'node:test'
import { places, TierBench, type TierBenchOptions } from '../../test/support/tier-bench.ts'
import { Random } from '../../test/support/random.ts'

function bench(t: TestContext, options: TierBenchOptions = {}): TierBench {
  const made = new TierBench(options)
  t.after(() => made.close())
  return made
}

/** Saves columns of region 0 as slot 0 wrote them, and gives their memory back. */
function saved(b: TierBench, count: number, firstPlace = 0): void {
  for (let c = 0; c < count; c++) b.write(0, c, 100 + c)
  const columns = { region: 0, first: 0, end: count }
  assert.equal(b.ended(b.tier.save(columns, places(firstPlace, count))), undefined)
  b.kv.discard(0, 0, count)
}

for (const faults of [true, false]) {
  test(`columns come back changed or in another order (userfaultfd: ${faults})`, (t) => {
    const b = bench(t, { faults, columns: 400, capacity: 400, layers: 7 })
    saved(b, 300)
    assert.equal(b.kv.residentBytes(), 0)
    const ticket = b.tier.load({ region: 4, first: 0, end: 300 }, places(0, 300))
    b.kv.map(1, 4, [])
    // Read at once, from the end: whoever touches waits, here or in map.
    for (let c = 299; c >= 0; c--) assert.ok(b.holds(1, c, 100 + c), `column ${c}`)
    assert.equal(b.ended(ticket), undefined)
    const { faults: count, loaded, saved: out, lost } = b.tier.stats()
    assert.deepEqual({ loaded, out, lost }, { loaded: 300, out: 300, lost: 0 })
    assert.equal(count > 0, faults)
    assert.equal(b.tier.facts.touches === 'none', !faults)
  })
}

test('scattered places, or parts of a region loaded apart, are mixed up', (t) => {
  const random = new Random(5)
  const b = bench(t, { columns: 64, capacity: 128 })
  for (let c = 0; c < 64; c++) b.write(0, c, c)
  const free = Array.from({ length: 128 }, (_, i) => i)
  const spots = Uint32Array.from(
    { length: 64 },
    () => free.splice(random.below(free.length), 1)[0]!,
  )
  b.ended(b.tier.save({ region: 0, first: 0, end: 64 }, spots))
  b.kv.discard(0, 0, 64)
  b.kv.map(2, 5, [])
  const cuts = [0, 1, 17, 18, 40, 64]
  const tickets = cuts.slice(1).map((end, i) => {
    const first = cuts[i]!
    return b.tier.load({ region: 5, first, end }, spots.subarray(first, end))
  })
  for (const ticket of tickets.reverse()) assert.equal(b.ended(ticket), undefined)
  for (let c = 0; c < 64; c++) assert.ok(b.holds(2, c, c))
})

test('a fresh page beside or after a loaded one waits, or is not zero', (t) => {
  const b = bench(t)
  saved(b, 3)
  const ticket = b.tier.load({ region: 0, first: 0, end: 3 }, places(0, 3))
  assert.equal(b.peek(0, 4), 0)
  b.ended(ticket)
  b.kv.discard(0, 0, 3)
  assert.equal(b.peek(0, 1), 0)
})

test('slots that share columns on their way do not all see them', (t) => {
  const b = bench(t)
  saved(b, 6)
  const ticket = b.tier.load({ region: 3, first: 0, end: 6 }, places(0, 6))
  const tokens = 6 * 8
  b.kv.map(1, 1, [{ region: 3, from: 0, to: tokens }])
  const part = [{ region: 3, from: 0, to: tokens - 3 }]
  b.kv.map(2, 2, part)
  b.kv.copy(2, 5, part)
  for (let c = 0; c < 6; c++) assert.ok(b.holds(1, c, 100 + c))
  for (let c = 0; c < 5; c++) assert.ok(b.holds(2, c, 100 + c))
  // The last column is the boundary's copy.
  assert.equal(b.peek(2, 5), b.peek(1, 5))
  b.ended(ticket)
})

test('a region given back while its columns are on their way gets them later', (t) => {
  const b = bench(t, { columns: 200, capacity: 200 })
  saved(b, 200)
  b.tier.load({ region: 3, first: 0, end: 200 }, places(0, 200))
  b.kv.discard(3, 0, 200)
  assert.equal(b.kv.residentBytes(), 0)
})

test('damage on disk is not noticed, or is read as content or as zeros', (t) => {
  const b = bench(t, { columns: 64, capacity: 64 })
  saved(b, 64)
  const { fd } = b.tier.file
  const { columnBytes } = b.tier
  const page = Buffer.alloc(4096)
  // Through the page cache of another descriptor of the same file, as an intruder would.
  const other = openAgain(t, fd)
  readSync(other, page, 0, 4096, 20 * columnBytes + 4096)
  page[77]! ^= 1
  writeSync(other, page, 0, 4096, 20 * columnBytes + 4096)
  const ticket = b.tier.load({ region: 4, first: 0, end: 64 }, places(0, 64))
  b.kv.map(1, 4, [])
  assert.equal(b.peek(1, 20), -1, 'a lost column reads as NaN')
  assert.equal(b.ended(ticket)?.code, 'kv_lost')
  assert.ok(b.holds(1, 19, 119) && b.holds(1, 21, 121))
  assert.equal(b.tier.stats().lost, 1)
})

test('a column of another place or of an earlier save is taken for the right one', (t) => {
  const b = bench(t)
  saved(b, 2)
  const { fd } = b.tier.file
  const { columnBytes } = b.tier
  const other = openAgain(t, fd)
  const old = Buffer.alloc(columnBytes)
  readSync(other, old, 0, columnBytes, 0)
  // Place 1 gets what place 0 has: same key, same content length, another place.
  writeSync(other, old, 0, columnBytes, columnBytes)
  const swapped = b.tier.load({ region: 3, first: 1, end: 2 }, places(1, 1))
  assert.equal(b.ended(swapped)?.code, 'kv_lost')
  saved(b, 1)
  writeSync(other, old, 0, columnBytes, 0)
  const stale = b.tier.load({ region: 4, first: 0, end: 1 }, places(0, 1))
  assert.equal(b.ended(stale)?.code, 'kv_lost')
  const never = b.tier.load({ region: 5, first: 0, end: 1 }, places(9, 1))
  assert.equal(b.ended(never)?.code, 'kv_lost')
})

test('plaintext reaches the disk', (t) => {
  const b = bench(t)
  saved(b, 8)
  const other = openAgain(t, b.tier.file.fd)
  const bytes = Buffer.alloc(8 * b.tier.columnBytes)
  readSync(other, bytes, 0, bytes.length, 0)
  b.write(0, 3, 103)
  for (let range = 0; range < 3; range++) {
    const word = Buffer.alloc(4)
    word.writeInt32LE(b.peek(0, 3, range))
    assert.equal(bytes.indexOf(word), -1)
  }
})

test('more is asked of a disk than it has', async () => {
  await assert.rejects(
    async () => new TierBench({ capacity: 2 ** 40 }).close(),
    (error: { code?: string }) => error.code === 'usage',
  )
})

/** The unlinked file once more, without O_DIRECT. */
function openAgain(t: TestContext, fd: number): number {
  const again = openSync(`/proc/self/fd/${fd}`, 'r+')
  t.after(() => closeSync(again))
  return again
}
