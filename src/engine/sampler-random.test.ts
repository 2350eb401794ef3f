// Owns the checks of the random numbers: against published vectors, and for the stream's contract.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { philox, RandomStream } from './sampler-random.ts'

// Known answers that Random123, the authors' own library, publishes for philox4x32-10.
const VECTORS: readonly [counter: number[], key: [number, number], output: number[]][] = [
  [
    [0, 0, 0, 0],
    [0, 0],
    [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8],
  ],
  [
    [0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff],
    [0xffffffff, 0xffffffff],
    [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd],
  ],
  [
    [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
    [0xa4093822, 0x299f31d0],
    [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
  ],
]

test('philox departs from the published known answers', () => {
  for (const [counter, [key0, key1], output] of VECTORS) {
    const words = Uint32Array.from(counter)
    philox(words, key0, key1)
    assert.deepEqual([...words], output)
  }
})

test('seeds that differ only above 32 bits, or in sign, share a stream', () => {
  const seeds = [0, 1, -1, 2 ** 32, 2 ** 32 + 1, -(2 ** 32), 2 ** 53 - 1, -(2 ** 53) + 1]
  const firsts = seeds.map((seed) => new RandomStream(seed).uniform())
  assert.equal(new Set(firsts).size, seeds.length)
})

test('a stream leaves [0, 1) or lacks the mean and variance of a uniform', () => {
  const stream = new RandomStream(42)
  const n = 200_000
  let sum = 0
  let squares = 0
  for (let i = 0; i < n; i++) {
    const u = stream.uniform()
    assert.ok(u >= 0 && u < 1)
    sum += u
    squares += u * u
  }
  const mean = sum / n
  // Five standard errors: 5 · sqrt(1/12/n) and 5 · sqrt(1/180/n).
  assert.ok(Math.abs(mean - 0.5) < 0.0033, `mean ${mean}`)
  assert.ok(Math.abs(squares / n - mean * mean - 1 / 12) < 0.00084)
})
