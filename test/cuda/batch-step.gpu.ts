// Catches a decode step of many rows, in one kernel or with a kernel a product, that computes
// something else than the matrix library and what comes between its products do: whatever the rows'
// lengths, with rows that pad, for heads of 64 and 128. KV memory is NaN but where tokens are, so a
// key that is read too early, too late or elsewhere shows; matrices are large enough for a block to
// write before another has read.

import assert from 'node:assert/strict'
import { after, test } from 'node:test'
import { CudaForward } from '../../src/backends/cuda/forward.ts'
import { gpuKvLayout } from '../../src/backends/cuda/kv-layout.ts'
import { dummyModel } from '../../src/model/dummy.ts'
import { close, Gpu } from './gpu.ts'

const gpu = new Gpu()
after(() => gpu[Symbol.dispose]())

/** Over all blocks of a model of random weights, whose errors grow from block to block. */
const TOLERANCE = 7e-2
const LENGTHS = [0, 1, 5, 16, 63, 64, 65, 127, 128, 129, 200, 319]
const TOKENS_MAX = 400
const NAN_BF16 = 0x7fc0

type Way = 'one kernel' | 'a kernel a product' | 'the library'

interface Case {
  model: string
  rows: number
  padding: number
  way: Way
}

const CASES: readonly Case[] = [
  { model: 'dummy:llama-3.2-1b', rows: 8, padding: 0, way: 'one kernel' },
  { model: 'dummy:llama-3.2-1b', rows: 64, padding: 5, way: 'one kernel' },
  { model: 'dummy:llama-3.1-8b', rows: 32, padding: 3, way: 'one kernel' },
  { model: 'dummy:llama-3.1-8b', rows: 64, padding: 0, way: 'one kernel' },
  { model: 'dummy:llama-3.1-8b', rows: 4, padding: 1, way: 'one kernel' },
  { model: 'dummy:llama-3.1-8b', rows: 2, padding: 0, way: 'a kernel a product' },
  { model: 'dummy:llama-3.1-8b', rows: 4, padding: 1, way: 'a kernel a product' },
  { model: 'dummy:llama-3.1-8b', rows: 16, padding: 0, way: 'a kernel a product' },
  { model: 'dummy:llama-3.1-8b', rows: 32, padding: 3, way: 'a kernel a product' },
  { model: 'dummy:qwen3-8b', rows: 64, padding: 0, way: 'a kernel a product' },
  { model: 'dummy:llama-3.1-8b', rows: 128, padding: 9, way: 'a kernel a product' },
]
const OPTIONS = {
  // Also of a model that is too small to gain by it.
  'one kernel': { wholeSteps: true, hopperAlways: true },
  'a kernel a product': { wholeSteps: false, hopperAlways: true },
  'the library': { wholeSteps: false, skinny: false },
} as const

for (const { model: name, rows, padding, way } of CASES) {
  const what = `${name}, ${rows} rows of which ${padding} pad, ${way}`
  test(`${what}: logits are not the library's`, (t) => {
    const { driver, device, modules, stream } = gpu
    const model = dummyModel(name)
    const layout = gpuKvLayout(model.config, TOKENS_MAX, 2 << 20)
    const address = driver.allocate(layout.slotBytes * rows)
    t.after(() => driver.free(address))
    const real = rows - padding
    const positionOf = (row: number) => LENGTHS[row] ?? 130 + ((row * 53) % 250)
    const logitsOf = (how: Way) => {
      const forward = new CudaForward(model, {
        ...{ device, modules, kv: { address, layout, regions: rows } },
        ...{ maxSequences: rows, stepTokens: rows, tune: false, ...OPTIONS[how] },
      })
      try {
        driver.fill16(address, NAN_BF16, (layout.slotBytes * rows) / 2, forward.stream)
        for (let row = 0; row < real; row++) {
          const tokens = positionOf(row)
          const at = address + row * layout.slotBytes
          const elements = (tokens * layout.tokenStride) / 2
          if (tokens > 0) forward.fillRandom(at, elements, row, 1)
        }
        driver.fill8(forward.logits, 0xff, rows * forward.vocab * 4, forward.stream)
        if (how === 'one kernel') assert.equal(forward.decoding.whyNotWhole(rows), undefined)
        return [0, 1].map(() => {
          for (let row = 0; row < rows; row++) {
            const some = row < real
            const token = some ? 1000 + row * 7 : 0
            forward.state.setRow(row, token, some ? positionOf(row) : 0, some ? row : -1, row, row)
          }
          forward.state.wait(forward.decode(rows))
          return gpu.get(forward.logits, new Float32Array(real * forward.vocab))
        })
      } finally {
        forward.close()
      }
    }
    const [want = new Float32Array()] = logitsOf('the library')
    const [got = new Float32Array(), again] = logitsOf(way)
    for (let row = 0; row < real; row++) {
      const of = (logits: Float32Array) =>
        logits.subarray((logits.length / real) * row, (logits.length / real) * (row + 1))
      close(of(got), of(want), TOLERANCE, `row ${row} of ${positionOf(row)} tokens`)
    }
    assert.deepEqual(again, got, 'the same bits each time')
    driver.synchronizeStream(stream)
  })
}
