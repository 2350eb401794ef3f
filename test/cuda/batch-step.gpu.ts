// Catches a decode step of many rows, in one kernel or with a kernel a product, that computes
// something else than the matrix library and what comes between its products do, or in fp8 than
// steps of one row: whatever the rows' lengths, with rows that pad, for heads of 64 and 128. KV
// memory is NaN but where tokens are, so a key that is read too early, too late or elsewhere shows;
// matrices are large enough for a block to write before another has read.

import assert from 'node:assert/strict'
import { after, test, type TestContext } from 'node:test'
import { CudaForward, type ForwardOptions } from '../../src/backends/cuda/forward.ts'
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

type Options = Pick<ForwardOptions, 'wholeSteps' | 'hopperAlways' | 'skinny' | 'quantization'>
type Step = Pick<Case, 'model' | 'rows' | 'padding'>

function positionOf(row: number): number {
  return LENGTHS[row] ?? 130 + ((row * 53) % 250)
}

/** Computes rows of logits, without those that pad, on KV memory of its own. */
class Setting {
  private readonly model: ReturnType<typeof dummyModel>
  private readonly rows: number
  private readonly real: number
  private readonly layout: ReturnType<typeof gpuKvLayout>
  private readonly address: number

  constructor(t: TestContext, { model, rows, padding }: Step) {
    this.model = dummyModel(model)
    this.rows = rows
    this.real = rows - padding
    this.layout = gpuKvLayout(this.model.config, TOKENS_MAX, 2 << 20)
    this.address = gpu.driver.allocate(this.layout.slotBytes * rows)
    t.after(() => gpu.driver.free(this.address))
  }

  /** The same step twice. */
  together(options: Options, whole: boolean): [Float32Array, Float32Array] {
    return this.with(options, (forward) => {
      if (whole) assert.equal(forward.decoding.whyNotWhole(this.rows), undefined)
      const step = () => {
        for (let row = 0; row < this.rows; row++) {
          const some = row < this.real
          const token = some ? tokenOf(row) : 0
          forward.state.setRow(row, token, some ? positionOf(row) : 0, some ? row : -1, row, row)
        }
        forward.state.wait(forward.decode(this.rows))
        return gpu.get(forward.logits, new Float32Array(this.real * forward.vocab))
      }
      return [step(), step()]
    })
  }

  /** Every row in a step of its own. */
  apart(options: Options): Float32Array {
    return this.with(options, (forward) => {
      const all = new Float32Array(this.real * forward.vocab)
      for (let row = 0; row < this.real; row++) {
        forward.state.setRow(0, tokenOf(row), positionOf(row), row, 0, row)
        forward.state.wait(forward.decode(1))
        const to = all.subarray(row * forward.vocab, (row + 1) * forward.vocab)
        gpu.get(forward.logits, to)
      }
      return all
    })
  }

  /** Rows that should be alike. */
  check(got: Float32Array, want: Float32Array, tolerance: number): void {
    for (let row = 0; row < this.real; row++) {
      const of = (logits: Float32Array) =>
        logits.subarray((logits.length / this.real) * row, (logits.length / this.real) * (row + 1))
      close(of(got), of(want), tolerance, `row ${row} of ${positionOf(row)} tokens`)
    }
  }

  private with<T>(options: Options, use: (forward: CudaForward) => T): T {
    const { rows, layout, address, model } = this
    const { driver, device, modules } = gpu
    const forward = new CudaForward(model, {
      ...{ device, modules, kv: { address, layout, regions: rows } },
      ...{ maxSequences: rows, stepTokens: rows, tune: false, ...options },
    })
    try {
      driver.fill16(address, NAN_BF16, (layout.slotBytes * rows) / 2, forward.stream)
      for (let row = 0; row < this.real; row++) {
        const at = address + row * layout.slotBytes
        const elements = (positionOf(row) * layout.tokenStride) / 2
        if (elements > 0) forward.fillRandom(at, elements, row, 1)
      }
      driver.fill8(forward.logits, 0xff, rows * forward.vocab * 4, forward.stream)
      return use(forward)
    } finally {
      forward.close()
    }
  }
}

function tokenOf(row: number): number {
  return 1000 + row * 7
}

for (const one of CASES) {
  const { model, rows, padding, way } = one
  const what = `${model}, ${rows} rows of which ${padding} pad, ${way}`
  test(`${what}: logits are not the library's`, (t) => {
    const setting = new Setting(t, one)
    const [want] = setting.together(OPTIONS['the library'], false)
    const [got, again] = setting.together(OPTIONS[way], way === 'one kernel')
    setting.check(got, want, TOLERANCE)
    assert.deepEqual(again, got, 'the same bits each time')
  })
}

/**
 * Of a kernel a product, which rounds tokens to four bits: it is as far from one row after the
 * other, 0.31 in the mean of 64 rows, at most 0.37.
 */
const ROUNDED_TOLERANCE = 0.45

for (const one of [
  { model: 'dummy:llama-3.2-1b', rows: 64, padding: 5 },
  { model: 'dummy:llama-3.1-8b', rows: 32, padding: 3 },
  { model: 'dummy:llama-3.1-8b', rows: 64, padding: 0 },
]) {
  const what = `${one.model} in fp8, ${one.rows} rows of which ${one.padding} pad`
  test(`${what}: logits are not those of one row after the other`, (t) => {
    const quantization = 'fp8'
    const setting = new Setting(t, one)
    // Of one token products read the same weights, and round no tokens either.
    const want = setting.apart({ quantization })
    const [got, again] = setting.together({ ...OPTIONS['one kernel'], quantization }, true)
    setting.check(got, want, TOLERANCE)
    assert.deepEqual(again, got, 'the same bits each time')
    const [rounded] = setting.together({ wholeSteps: false, quantization }, false)
    setting.check(got, rounded, ROUNDED_TOLERANCE)
  })
}
