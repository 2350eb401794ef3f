// Catches a pager that dies and leaves somebody waiting for ever, pages that read as zeros, or an
// engine that goes on.

import assert from 'node:assert/strict'
import { test, type TestContext } from 'node:test'
import { places, TierBench, type TierBenchOptions } from '../../test/support/tier-bench.ts'
import { touchFromThread } from '../../test/support/toucher.ts'

const COLUMNS = 400
/** Saving moves as many as loading: it stops in the middle of the load. */
const MIDDLE = COLUMNS * 1.5

/** Its pager fails in the middle of the load of region 4, which slot 1 shows. */
function loading(t: TestContext, options: TierBenchOptions): TierBench {
  const b = new TierBench({ columns: COLUMNS, capacity: COLUMNS, ...options })
  t.after(() => b.close())
  for (let c = 0; c < COLUMNS; c++) b.write(0, c, c)
  const columns = { region: 0, first: 0, end: COLUMNS }
  assert.equal(b.ended(b.tier.save(columns, places(0, COLUMNS))), undefined)
  b.kv.discard(0, 0, COLUMNS)
  b.kv.map(1, 4, [])
  b.tier.load({ region: 4, first: 0, end: COLUMNS }, places(0, COLUMNS))
  return b
}

test('an exception in the pager leaves a thread in its fault, or lets it read zeros', (t) => {
  const b = loading(t, { pagerFault: { kind: 'throw', afterColumns: MIDDLE } })
  let wrong = 0
  for (let c = COLUMNS - 1; c >= 0; c--) {
    if (b.holds(1, c, c)) continue
    for (let range = 0; range < 3; range++) assert.equal(b.peek(1, c, range), -1)
    wrong++
  }
  assert.ok(wrong > 0, 'the pager did not fail')
  assert.throws(() => b.tier.check(), { code: 'pager_failed' })
})

test('a pager that is killed leaves a thread in its fault, or lets it read zeros', async (t) => {
  const b = loading(t, { pagerFault: { kind: 'stall', afterColumns: MIDDLE } })
  const { slotBytes, shape } = b.layout
  // One by one, until one waits for what does not come.
  const last = b.kv.address + slotBytes + (COLUMNS - 1) * shape.pageBytes
  const touches = [last, last + b.layout.rangeBytes].map(touchFromThread)
  await Promise.all(touches.map(({ begun }) => begun))
  assert.equal(b.deathCode(), undefined)
  await b.killPager()
  assert.equal(b.deathCode(), 'pager_failed')
  for (const { value } of touches) assert.equal(await value, -1)
  assert.throws(() => b.tier.check(), { code: 'pager_failed' })
  for (let c = 0; c < COLUMNS; c++) assert.ok(b.holds(1, c, c) || b.peek(1, c) === -1)
})

test('after its death something is asked of it', async (t) => {
  const b = new TierBench()
  t.after(() => b.close())
  b.write(0, 0, 1)
  await b.killPager()
  const columns = { region: 0, first: 0, end: 1 }
  assert.throws(() => b.tier.save(columns, places(0, 1)), { code: 'pager_failed' })
})
