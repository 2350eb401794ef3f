// Catches a queue that forgets who waits, lets one wait beyond his time, or asks who is not due.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Turns } from './turns.ts'

class One {
  queuedMs = Infinity
  isTouched = false
  wantedMs: number | undefined
  turns = 0
}

test('somebody waits beyond his time, or is asked before', () => {
  let state = 12_345
  const random = (below: number) => {
    state = (Math.imul(state, 1_103_515_245) + 12_345) >>> 0
    return (state >>> 8) % below
  }
  const turns = new Turns<One>()
  const all = Array.from({ length: 300 }, () => new One())
  for (const one of all) turns.touch(one)
  for (let now = 0; now < 3000; now++) {
    const touched = new Set<One>()
    for (let i = 0; i < 3; i++) {
      const one = all[random(all.length)]!
      turns.touch(one)
      touched.add(one)
    }
    const asked = new Set<One>()
    const next = turns.run(now, (one) => {
      assert.ok(!asked.has(one), 'asked twice')
      asked.add(one)
      one.turns++
      one.wantedMs = random(10) === 0 ? undefined : now + 1 + random(40)
      return one.wantedMs
    })
    for (const one of touched) assert.ok(asked.has(one))
    const waiting = all.flatMap(({ wantedMs }) => (wantedMs === undefined ? [] : [wantedMs]))
    assert.ok(Math.min(...waiting) > now)
    // Earlier than anybody wants is allowed: one who was touched has changed his mind.
    assert.ok(next !== undefined && next <= Math.min(...waiting))
  }
  assert.ok(all.every((one) => one.turns > 10))
})

test('who is touched during a turn has another one at once', () => {
  const turns = new Turns<One>()
  const [a, b] = [new One(), new One()]
  turns.touch(a)
  const next = turns.run(5, (one) => {
    if (one === a) turns.touch(b)
    return undefined
  })
  assert.equal(next, 5)
  let asked = 0
  assert.equal(
    turns.run(5, (one) => {
      assert.equal(one, b)
      asked++
      return undefined
    }),
    undefined,
  )
  assert.equal(asked, 1)
})
