// Catches a history that grows without end, loses what just happened, or counts it twice.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { KvHistory, watched } from './history.ts'
import { layerMajor } from './layout.ts'

test('events of one moment are many, those of different ones are one, or old ones stay', () => {
  let nowMs = 0
  const history = new KvHistory(() => nowMs)
  for (let i = 0; i < 5; i++) {
    history.add('fork', 100)
    history.add('copy', 7)
  }
  nowMs = 99
  history.add('fork', 100)
  nowMs = 100
  history.add('fork', 50, 2)
  assert.deepEqual(history.events(), [
    { kind: 'fork', atMs: 0, count: 6, bytes: 600 },
    { kind: 'copy', atMs: 0, count: 5, bytes: 35 },
    { kind: 'fork', atMs: 100, count: 2, bytes: 50 },
  ])
  for (let i = 0; i < 1000; i++) {
    nowMs += 100
    history.add('evict', 1)
  }
  const events = history.events()
  assert.equal(events.length, 256)
  assert.deepEqual(events.at(-1), { kind: 'evict', atMs: nowMs, count: 1, bytes: 1 })
  assert.deepEqual(Object.fromEntries(history.totals), {
    fork: { count: 8, bytes: 650 },
    copy: { count: 5, bytes: 35 },
    evict: { count: 1000, bytes: 1000 },
  })
})

test('a fork shares or copies other bytes than are said', () => {
  // 3.2 tokens a page, two layers.
  const layout = layerMajor({ layers: 2, rowBytes: 80, maxTokens: 40, pageBytes: 256 })
  const moved: unknown[] = []
  const history = new KvHistory(() => 0)
  const mover = watched(
    {
      map: (...args) => moved.push(args),
      copy: (...args) => moved.push(args),
      discard: (...args) => moved.push(args),
    },
    layout,
    history,
  )
  mover.map(1, 5, [])
  mover.discard(2, 3, 4)
  assert.equal(history.totals.size, 0)
  const shared = [{ region: 0, from: 0, to: 10 }]
  mover.map(1, 5, shared)
  mover.copy(1, 3, shared)
  assert.deepEqual(Object.fromEntries(history.totals), {
    fork: { count: 1, bytes: 2 * 3 * 256 },
    copy: { count: 1, bytes: 2 * (800 - 768) },
  })
  mover.map(1, 5, [{ region: 0, from: 0, to: 16 }])
  assert.equal(history.totals.get('copy')?.count, 1, '16 tokens fill whole pages')
  assert.equal(moved.length, 5)
})
