// Catches numbers that a person would misread.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { formatBytes, formatMs, formatTable } from './table.ts'

test('sizes have the unit that fits, also just below the next one', () => {
  const sizes: [number, string][] = [
    [0, '0 B'],
    [1023, '1023 B'],
    [1024, '1 KiB'],
    [65_536, '64 KiB'],
    [1_048_575, '1 MiB'],
    [1_610_612_736, '1.5 GiB'],
    [2 ** 50, '1024 TiB'],
  ]
  for (const [bytes, text] of sizes) assert.equal(formatBytes(bytes), text)
})

test('durations have the unit that fits, also just below the next one', () => {
  const durations: [number, string][] = [
    [0, '0 ms'],
    [999.4, '999 ms'],
    [999.6, '1.0 s'],
    [59_949, '59.9 s'],
    [59_960, '1 min 0 s'],
    [185_000, '3 min 5 s'],
  ]
  for (const [ms, text] of durations) assert.equal(formatMs(ms), text)
})

test('columns line up, numbers at their last digit', () => {
  const table = formatTable(
    [{ title: 'NAME' }, { title: 'N', right: true }],
    [
      ['a', '1'],
      ['longer', '1000'],
    ],
  )
  assert.equal(table, ['NAME       N', 'a          1', 'longer  1000'].join('\n'))
})
