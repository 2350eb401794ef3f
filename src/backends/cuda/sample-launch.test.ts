// Catches rows that are shared by more blocks than run at once, or where blocks cannot share.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { blocksOfRow } from './sample-launch.ts'

const H100 = { capability: 90, multiprocessors: 132 }
const ROWS = [1, 8, 14, 15, 28, 29, 64, 256]

test('rows are shared by too many blocks, or too few', () => {
  const blocks = ROWS.map((rows) => blocksOfRow(rows, 128_256, H100))
  assert.deepEqual(blocks, [8, 8, 8, 4, 4, 2, 2, 2])
})

test('a small vocabulary is cut into parts that are not worth a block', () => {
  const blocks = [33, 4096, 4097, 9000, 32_000].map((vocab) => blocksOfRow(1, vocab, H100))
  assert.deepEqual(blocks, [1, 1, 2, 4, 8])
})

test('clusters are asked of a GPU that has none', () => {
  const a100 = { capability: 80, multiprocessors: 108 }
  assert.ok(ROWS.every((rows) => blocksOfRow(rows, 128_256, a100) === 1))
})
