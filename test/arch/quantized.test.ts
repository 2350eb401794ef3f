// The programs over repacked weights, where products of one input are one taller matrix: biases,
// head norms, rope and gates then work on parts of a row. In files of one type and of several.

import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { Golden } from './golden.ts'
import { quantized } from './quantized-model.ts'
import { Stepper } from './stepper.ts'
import type { Model } from '../../src/model/model.ts'

/** Inputs of products are rounded to 8 bits in each layer; a wrong part of a row costs 0.3. */
const TOLERANCE = 0.1

for (const family of ['llama-biased', 'qwen2', 'qwen3', 'gemma3']) {
  const golden = new Golden(family)
  const whole = quantized(golden.model)
  const plain = golden.model.tensors
  describe(`${family} wrong with repacked`, () => {
    test('matrices', () => check(golden, whole))
    test('matrices, except values and gates', () => check(golden, mixed(whole, /attn_v|ffn_gate/)))
    test('matrices, except keys and ups', () => check(golden, mixed(whole, /attn_k|ffn_up/)))
  })

  /** Some matrices as they were, which keeps them from being joined with others. */
  function mixed(model: Model, kept: RegExp): Model {
    const tensors = new Map(model.tensors)
    for (const [name, tensor] of plain) {
      if (kept.test(name) && name.endsWith('.weight')) {
        tensors.set(name, { ...tensor, file: model.files.length + tensor.file })
      }
    }
    return { ...model, tensors, files: [...model.files, ...golden.model.files] }
  }
}

function check(golden: Golden, model: Model): void {
  using s = new Stepper(golden, { model })
  assert.ok(s.backend.weights.repackedBytes.size > 0, 'this processor has a layout to repack to')
  const slots = [1, 2, 4]
  const errors: number[] = []
  slots.forEach((slot, i) => {
    s.hold(slot, i)
    errors.push(...s.run({ slot, count: 20 + i }).map(({ error }) => error))
  })
  for (let i = 0; i < 10; i++) {
    const parts = slots.map((slot) => ({ slot, count: slot === 2 ? 3 : 1 }))
    errors.push(...s.run(...parts).map(({ error }) => error))
  }
  const worst = Math.max(...errors)
  assert.ok(worst <= TOLERANCE, `relative error ${worst}`)
}
