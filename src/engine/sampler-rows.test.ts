// Owns the checks of the exponentials behind sampling: how close they are, and what they leave out.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { RowWeights, UNITS_PER_NAT } from './sampler-rows.ts'

test('an exponential is further off than its error bound', () => {
  const rows = new RowWeights(1000)
  for (let d = 0; d < 60; d += 0.00137) {
    const expected = Math.exp(-d)
    const relative = Math.abs(rows.weight(d * UNITS_PER_NAT) / expected - 1)
    assert.ok(relative < 4.2e-11, `exp(-${d}) is off by ${relative}`)
  }
  assert.equal(rows.weight(0), 1)
  assert.equal(rows.weight(Infinity), 0)
  assert.equal(rows.weight(1e300), 0)
})

test('a sum leaves out more than it claims, or counts -Infinity', () => {
  const vocab = 1_001
  const rows = new RowWeights(vocab)
  for (const far of [0, 1, 20, 36, 43, 44, 50, 1e5, Infinity]) {
    const row = new Float32Array(vocab).fill(-far)
    row[500] = 0
    const exact = 1 + 1000 * Math.exp(-far)
    const sum = rows.sum(row, 0, UNITS_PER_NAT)
    assert.ok(Math.abs(sum / exact - 1) < 4.2e-11, `${far} below: ${sum}`)
    rows.boundOf(row, 0, UNITS_PER_NAT, 0.5)
    assert.ok(Math.abs(rows.total / exact - 1) < 4.2e-11, `${far} below: ${rows.total}`)
  }
})
