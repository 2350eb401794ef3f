// Catches attention that is launched with more shared memory than a GPU has, or in a shape that no
// kernel takes.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { attentionVariants, GROUP_MAX, HEAD_DIMS } from './attention-variants.ts'

/** Compute capability, and the most shared memory that a block can have. */
const GPUS = [
  ['A100', 80, 163 << 10],
  ['L4', 89, 99 << 10],
  ['H100', 90, 227 << 10],
  ['B200', 100, 227 << 10],
] as const

test('a variant does not fit in the shared memory of a GPU', () => {
  for (const [name, capability, room] of GPUS) {
    for (const headDim of HEAD_DIMS) {
      for (let group = 1; group <= GROUP_MAX; group++) {
        const shape = { heads: 2 * group, kvHeads: 2, headDim, scale: 1 }
        const { decode, prefill } = attentionVariants(shape, capability, room)
        const what = `${name}, ${group} heads of ${headDim}`
        for (const { sharedBytes, threads } of [decode, prefill]) {
          assert.ok(sharedBytes <= room, `${what}: ${sharedBytes} bytes`)
          assert.ok(threads <= 1024 && threads % 32 === 0, `${what}: ${threads} threads`)
        }
      }
    }
  }
})

test('a shape that no kernel takes is launched all the same', () => {
  const shapes = [
    { heads: 8, kvHeads: 2, headDim: 80, scale: 1 },
    { heads: 34, kvHeads: 2, headDim: 64, scale: 1 },
  ]
  for (const shape of shapes) {
    assert.throws(() => attentionVariants(shape, 90, 227 << 10), { code: 'model_unsupported' })
  }
})
