// Catches a decode step that is planned as one kernel in a shape or order the kernel does not do,
// and one that is not though it could be.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { programFor } from '../../model/arch/programs.ts'
import { dummyModel } from '../../model/dummy.ts'
import { planStep, stepVariant } from './decode-step.ts'
import { fuse, fuseSkinny } from './fuse.ts'

const GPUS = [
  ['A100', 108, 163 << 10],
  ['L4', 58, 99 << 10],
  ['H100', 132, 227 << 10],
  ['B200', 148, 227 << 10],
] as const

function planOf(name: string) {
  return planStep(fuseSkinny(fuse(programFor(dummyModel(name)), true)))
}

test('phases of a Llama are not its products and attention in order', () => {
  const plan = planOf('dummy:llama-3.1-8b')
  assert.ok(!('reason' in plan))
  const block = ['rope', 'attention', 'add', 'glu', 'add']
  const kinds = [...Array.from({ length: 32 }, () => block).flat(), 'logits']
  assert.deepEqual(
    plan.map(({ kind }) => kind),
    kinds,
  )
  const last = plan.slice(-6)
  assert.deepEqual(
    last.map(({ layer }) => layer),
    [31, 31, 0, 0, 0, 0],
  )
  assert.ok(last.every(({ norm }, i) => (norm !== undefined) === [0, 3, 5].includes(i)))
})

test('norms of heads, which the kernel has not, are planned all the same', () => {
  assert.deepEqual(planOf('dummy:qwen3-8b'), { reason: 'there is a rope between its products' })
})

test('a variant asks for more of a GPU than it has', () => {
  const { config } = dummyModel('dummy:llama-3.1-8b')
  const shape = { config, inputs: [4096, 14336], normed: [4096] }
  for (const [name, multiprocessors, room] of GPUS) {
    for (const tokens of [1, 2, 4]) {
      const variant = stepVariant(shape, tokens, multiprocessors, room)
      if ('reason' in variant) {
        assert.equal(name, 'L4')
        continue
      }
      const { SLOTS = 0, SEGMENT = 0, WARPS = 0, SPLITS = 0 } = variant.defines
      const barriers = WARPS * SLOTS * 16
      assert.ok(variant.sharedBytes + barriers + 2400 <= room, `${name}, ${tokens} tokens`)
      assert.ok(SLOTS >= 3 && SEGMENT % 512 === 0)
      assert.ok(tokens * config.kvHeads * SPLITS <= multiprocessors, 'each stretch has its block')
    }
  }
  assert.ok('reason' in stepVariant(shape, 3, 132, 227 << 10))
  assert.ok('reason' in stepVariant({ ...shape, inputs: [100] }, 1, 132, 227 << 10))
})
