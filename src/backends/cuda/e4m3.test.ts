// Catches a matrix that is fp8 although its product cannot be, or is not although it can; a product
// whose neighbours do not do its work; and fp8 that is promised where there is none.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { FAMILIES, Golden } from '../../../test/arch/golden.ts'
import { choosePlace, weightBytes } from '../../engine/place.ts'
import { programFor } from '../../model/arch/programs.ts'
import { dummyModel } from '../../model/dummy.ts'
import type { Model } from '../../model/model.ts'
import { e4m3Weights, planE4m3 } from './e4m3.ts'
import { fuse } from './fuse.ts'
import { whyNotFp8 } from './quantization.ts'

const H100 = { name: 'NVIDIA H100', capability: 90 }
const llama = dummyModel('dummy:llama-3.1-8b')

test('a matrix of a block stays bfloat16, or the embedding or output does not', () => {
  const names = e4m3Weights(llama, H100)
  const matrices = [...llama.tensors.values()].filter(({ shape }) => shape.length === 2)
  for (const { name } of matrices) assert.equal(names.has(name), name.startsWith('blk.'), name)
  assert.equal(names.size, 7 * 32)
})

test('weights of fp8 take more than half of the memory, and KV gets less than is free', () => {
  const wide = weightBytes(llama, new Set())
  const narrow = weightBytes(llama, e4m3Weights(llama, H100))
  // 6.98e9 elements in blocks, of 8.03e9.
  assert.ok(wide - narrow > 6.97e9 && wide - narrow < 6.98e9, `${wide} and ${narrow}`)
})

/** The model with other sizes. */
function shaped(sizes: Partial<Model['config']>): Model {
  const config = { ...llama.config, ...sizes }
  const { hidden, heads, kvHeads, headDim, feedForward } = config
  const [q, kv] = [heads * headDim, kvHeads * headDim]
  const shapes: Record<string, readonly number[]> = {
    attn_q: [hidden, q],
    attn_k: [hidden, kv],
    attn_v: [hidden, kv],
    attn_output: [q, hidden],
    ffn_gate: [hidden, feedForward],
    ffn_up: [hidden, feedForward],
    ffn_down: [feedForward, hidden],
  }
  const tensors = new Map(llama.tensors)
  for (const [name, tensor] of llama.tensors) {
    const shape = shapes[name.split('.')[2] ?? ''] ?? tensor.shape.with(0, hidden)
    tensors.set(name, { ...tensor, shape })
  }
  return { ...llama, config, tensors }
}

/** Of the second block. */
function narrowIn(model: Model): string[] {
  const names = [...e4m3Weights(model, H100)].filter((name) => name.startsWith('blk.1.'))
  return names.map((name) => name.split('.')[2]!).toSorted()
}

test('a product of odd sizes is fp8, or takes others with it', () => {
  const attention = ['attn_k', 'attn_output', 'attn_q', 'attn_v']
  const others = ['ffn_down', 'ffn_gate', 'ffn_up']
  assert.deepEqual(narrowIn(shaped({})), [...attention, ...others])
  assert.deepEqual(narrowIn(shaped({ feedForward: 14_344 })), attention)
  assert.deepEqual(narrowIn(shaped({ feedForward: 32_784 })), [...attention, 'ffn_gate', 'ffn_up'])
  // Keys are one matrix with queries.
  assert.deepEqual(narrowIn(shaped({ kvHeads: 1, headDim: 8 })), ['attn_output', ...others])
})

test('a model without any such product, or a GPU without fp8, is taken silently', () => {
  assert.throws(() => e4m3Weights(shaped({ hidden: 4104 }), H100), { code: 'model_unsupported' })
  const ampere = { name: 'NVIDIA A100', capability: 80 }
  assert.throws(() => e4m3Weights(llama, ampere), {
    code: 'backend_unavailable',
    message: 'NVIDIA A100 has no fp8: its compute capability is 8.0, 8.9 is needed.',
  })
  for (const capability of [89, 90, 100, 120]) assert.equal(whyNotFp8({ capability }), undefined)
})

test('the CPU computes in fp8, or as if nobody had asked for it', async () => {
  const options = { modelId: 'x', device: 'cpu', quantization: 'fp8' } as const
  await assert.rejects(choosePlace('x', llama, options), {
    code: 'usage',
    message: /--quantization/,
  })
})

test('a decode step of a Llama has kernels that only quantise or scale, but for attention', () => {
  const nodes = fuse(programFor(llama), true)
  const { products, narrowing, scaling } = planE4m3(nodes, e4m3Weights(llama, H100))
  assert.equal(products.size, 4 * 32)
  for (const product of products) {
    const name = product.weights[0]!
    assert.equal(narrowing.has(product), !name.includes('attn_output'), `${name} is quantised`)
    const by = name.includes('attn_q') ? 'rope' : name.includes('ffn_gate') ? 'glu' : 'norm'
    assert.equal(scaling.get(product)?.kind, by, `${name} is scaled`)
  }
})

test('a bias is added to sums that are not scaled yet', () => {
  for (const family of FAMILIES) {
    const { model } = new Golden(family)
    const nodes = fuse(programFor(model), true)
    const { scaling } = planE4m3(nodes, e4m3Weights(model, H100))
    for (const { biases, weights } of scaling.keys()) {
      assert.ok(
        biases.every((bias) => bias === undefined),
        `${family}: ${weights.join()}`,
      )
    }
  }
})
