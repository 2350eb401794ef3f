// Catches floors that leave out weights, keys or operations of a step, or count some twice: against
// sums over the model's tensors and its shape.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { fuse, fuseSkinny } from '../backends/cuda/fuse.ts'
import { programFor } from '../model/arch/programs.ts'
import { dummyModel } from '../model/dummy.ts'
import { floorUs, StepWork } from './gpu-floors.ts'
import { prefillFlops } from './gpu-serve.ts'

const model = dummyModel('dummy:llama-3.1-8b')
const program = programFor(model)
const { layers, kvHeads, headDim, hidden, vocab } = model.config
const NONE: ReadonlySet<string> = new Set()
const matrices = [...model.tensors.values()].filter(
  ({ name, shape }) => shape.length === 2 && name !== 'token_embd.weight',
)
const elements = matrices.reduce((sum, { shape: [k = 0, m = 0] }) => sum + k * m, 0)
const decode = { tokens: 64, outputs: 64, seen: 64 * 577, pairs: 64 * 577 }
const kvBytes = decode.seen * layers * 2 * kvHeads * headDim * 2

test('a step in one kernel reads more or less than all weights and keys', () => {
  const [, ...nodes] = fuse(program, true)
  const { bytes, operations } = new StepWork(program, model.tensors, NONE, decode).of(nodes)
  assert.equal(bytes, elements * 2 + kvBytes)
  const attention = 4 * layers * model.config.heads * headDim * decode.seen
  assert.equal(operations, 2 * elements * 64 + attention)
})

test('weights of a byte each are counted as two', () => {
  const narrow = new Set(
    matrices.map(({ name }) => name).filter((name) => name !== 'output.weight'),
  )
  const nodes = fuse(program, true)
  const { bytes } = new StepWork(program, model.tensors, narrow, decode).of(nodes)
  assert.equal(bytes, elements + vocab * hidden + kvBytes)
})

test('a kernel a product leaves work out, or does it twice', () => {
  for (const nodes of [fuse(program, true), fuseSkinny(fuse(program, true))]) {
    const work = new StepWork(program, model.tensors, NONE, decode)
    const works = nodes.map((node) => work.of([node]))
    const bytes = works.reduce((sum, one) => sum + one.bytes, 0)
    const rows = bytes - elements * 2 - kvBytes
    // Of each token's rows in a block some 0.2–0.3 MB, and float32 logits.
    assert.ok(rows > 64 * vocab * 4 + 64 * layers * 1e5, `${rows} bytes of rows`)
    assert.ok(rows < 64 * vocab * 4 + 64 * layers * 4e5, `${rows} bytes of rows`)
  }
})

test('operations of prompts are not those of the shape', () => {
  const tokens = 2048
  const rows = { tokens, outputs: 1, seen: tokens, pairs: (tokens * tokens) / 2 }
  const work = new StepWork(program, model.tensors, NONE, rows)
  const { operations } = work.of(fuse(program, false))
  // Beside what all tokens see: the last block and the logits of one token.
  const rest = operations - prefillFlops(tokens)
  assert.ok(rest > 0 && rest < 3e9, `${rest} operations more`)
})

test('the shorter of two times is taken', () => {
  const ceilings = { readGBs: 1000, teraflops: 100 }
  assert.equal(floorUs({ bytes: 1e9, operations: 1e9 }, ceilings), 1000)
  assert.equal(floorUs({ bytes: 1e6, operations: 1e11 }, ceilings), 1000)
})
