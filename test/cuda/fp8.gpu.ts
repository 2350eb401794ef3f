// Catches rows of e4m3 that are not the nearest, scales that are lost or another row's, and a model
// in fp8 whose answers are further from transformers' than rounding to four bits explains.

import assert from 'node:assert/strict'
import { after, test } from 'node:test'
import { StepBatch } from '../../src/backends/backend.ts'
import { CudaBackend } from '../../src/backends/cuda/backend.ts'
import { rowThreads } from '../../src/backends/cuda/e4m3-rows.ts'
import type { KernelFinder } from '../../src/backends/cuda/kernels.ts'
import { gpuKvLayout } from '../../src/backends/cuda/kv-layout.ts'
import { Matmuls } from '../../src/backends/cuda/matmul.ts'
import type { StepState } from '../../src/backends/cuda/state.ts'
import { loadCublasLt } from '../../src/ffi/cublaslt.ts'
import { FAMILIES, Golden } from '../arch/golden.ts'
import { fromE4m3, quantised } from '../support/e4m3.ts'
import { temporaryDirectory } from '../support/temporary.ts'
import { BF16_ERROR, close, Gpu, Random, randomBf16, toBf16 } from './gpu.ts'
import { PlainKv } from './plain-kv.ts'
import { ReferenceAttention } from './reference-attention.ts'

const gpu = new Gpu()
after(() => gpu[Symbol.dispose]())
const random = new Random(23)

/** Of a row's bytes: what lies in the middle of two may be rounded either way. */
const BYTES_ALIKE = 0.999

interface Rows {
  bytes: Uint8Array
  scales: Float32Array
}

/** Rows on the device, as e4m3 and scales. */
function rowsAt(out: number, scales: number, rows: number, width: number): Rows {
  const bytes = gpu.get(out, new Uint8Array(rows * width))
  return { bytes, scales: gpu.bf16(scales, rows) }
}

function checkRows(got: Rows, want: Float32Array, width: number, exact: boolean, what: string) {
  let alike = 0
  got.scales.forEach((scale, r) => {
    const row = want.subarray(r * width, (r + 1) * width)
    const oracle = quantised(row)
    if (exact) assert.equal(scale, oracle.scale, `${what}: scale of row ${r}`)
    const bytes = got.bytes.subarray(r * width, (r + 1) * width)
    close([scale], [oracle.scale], 2 ** -7, `${what}: scale of row ${r}`)
    row.forEach((x, i) => {
      if (bytes[i] === oracle.bytes[i]) alike++
      // Half of the last bit, or of the smallest step; a little more if its scale differs.
      const most = 1.02 * Math.max(Math.abs(x) / 16, scale / 1024)
      const error = Math.abs(fromE4m3(bytes[i]!) * scale - x)
      assert.ok(error <= most, `${what}: row ${r}, element ${i}: ${x} is off by ${error}`)
    })
  })
  if (exact) assert.ok(alike >= BYTES_ALIKE * want.length, `${what}: ${alike} of ${want.length}`)
}

for (const [rows, width] of [
  [1, 16],
  [7, 576],
  [3, 14336],
  [2, 32768],
  [300, 4096],
] as const) {
  test(`rows of ${width} are not quantised to the nearest`, () => {
    const x = randomBf16(random, rows * width, 3)
    // Rows of other sizes, of zeros, and of numbers that are nearly none.
    for (let i = 0; i < x.length; i++) x[i]! *= [1, 1e-3, 1e4, 0, 1e-36][Math.floor(i / width) % 5]!
    const [bits, out] = [toBf16(x), gpu.poisoned(rows * width)]
    const scales = gpu.poisoned(rows * 2)
    const args = [gpu.put(bits), out, scales, width]
    gpu.run('quantise.cu', 'quantiseRows', 'aaai', args, [rows], rowThreads(width))
    const kept = gpu.bf16(args[0]!, x.length)
    checkRows(rowsAt(out, scales, rows, width), kept, width, true, `${width}`)
  })
}

test('what is no number becomes one', () => {
  const x = Float32Array.from({ length: 32 }, (_, i) => (i === 5 ? Number.NaN : 1))
  const [out, scales] = [gpu.poisoned(32), gpu.poisoned(2)]
  gpu.run('quantise.cu', 'quantiseRows', 'aaai', [gpu.put(toBf16(x)), out, scales, 32], [1], 32)
  assert.ok(Number.isNaN(fromE4m3(gpu.get(out, new Uint8Array(32))[5]!)))
})

function rms(row: Float32Array): number {
  return Math.sqrt(row.reduce((sum, x) => sum + x * x, 0) / row.length + 1e-5)
}

/** What stands for a product: sums, and the scales that make numbers of them. */
function product(rows: number, width: number) {
  const sums = randomBf16(random, rows * width, 1000)
  const by = randomBf16(random, width, 0.01).map(Math.abs)
  const tokens = randomBf16(random, rows, 0.05).map(Math.abs)
  const numbers = sums.map((x, i) => x * by[i % width]! * tokens[Math.floor(i / width)]!)
  const at = [sums, by, tokens].map((values) => gpu.put(toBf16(values)))
  return { numbers, sums: at[0]!, by: at[1]!, tokens: at[2]! }
}

test('a product is scaled wrongly, alone or added to what is there', () => {
  const [rows, width, stride] = [5, 208, 304]
  const { numbers, sums, by, tokens } = product(rows, width)
  const old = randomBf16(random, rows * stride, 0.1)
  for (const accumulate of [0, 1]) {
    const out = gpu.put(toBf16(old))
    const args = [sums, by, tokens, out, width, width, stride, accumulate]
    gpu.run('quantise.cu', 'scaleProduct', 'aaaaiiii', args, [1, rows], 256)
    const want = old.map((x, i) => {
      const [r, c] = [Math.floor(i / stride), i % stride]
      return c < width ? accumulate * x + numbers[r * width + c]! : x
    })
    close(gpu.bf16(out, old.length), want, BF16_ERROR, `accumulate ${accumulate}`)
  }
})

for (const width of [64, 4096, 8224]) {
  for (const [scaled, narrow] of [
    [true, true],
    [true, false],
    [false, true],
  ]) {
    const how = `${scaled ? 'after' : 'not after'} a product, ${narrow ? 'e4m3' : 'bf16'} out`
    test(`a norm of ${width} is wrong ${how}`, () => {
      const rows = 6
      const { numbers, sums, by, tokens } = product(rows, width)
      const x = randomBf16(random, rows * width, 3)
      const weight = Float32Array.from({ length: width }, () => 0.5 + random.next())
      for (const post of [undefined, weight.toReversed()]) {
        const [inOut, out] = [gpu.put(toBf16(x)), gpu.poisoned(rows * width * 2)]
        const scales = gpu.poisoned(rows * 2)
        const added = scaled ? sums : gpu.put(toBf16(numbers))
        const args = [inOut, added, post ? gpu.put(post) : 0, gpu.put(weight), out, width, 1e-5]
        const more = [narrow ? scales : 0, scaled ? by : 0, scaled ? tokens : 0]
        const threads = Math.min(1024, Math.ceil(width / 8 / 32) * 32)
        const kernel = width > 8192 ? 'normRowE4m3Wide' : 'normRowE4m3'
        gpu.run('norm.cu', kernel, 'aaaaaifaaa', [...args, ...more], [rows], threads)
        const normed = new Float32Array(rows * width)
        const sumsOf = new Float32Array(rows * width)
        for (let r = 0; r < rows; r++) {
          const a = numbers.subarray(r * width, (r + 1) * width)
          const divisor = post ? rms(a) : 1
          const sum = x
            .slice(r * width, (r + 1) * width)
            .map((v, i) => v + (a[i]! / divisor) * (post?.[i] ?? 1))
          sumsOf.set(sum, r * width)
          normed.set(
            sum.map((v, i) => (v / rms(sum)) * weight[i]!),
            r * width,
          )
        }
        close(gpu.bf16(inOut, x.length), sumsOf, BF16_ERROR, 'sum')
        if (!narrow) close(gpu.bf16(out, x.length), normed, BF16_ERROR, 'norm')
        else {
          const { bytes, scales: by } = rowsAt(out, scales, rows, width)
          const got = Float32Array.from(bytes, (b, i) => fromE4m3(b) * by[Math.floor(i / width)]!)
          close(got, normed, E4M3_ERROR, 'norm')
        }
      }
    })
  }
}

/** Half of the last of four bits at most, in the mean a quarter: relative, root mean square. */
const E4M3_ERROR = 3.2e-2

test('a gate is wrong after a product, or its rows are', () => {
  for (const [width, kernel] of [
    [48, 'gluE4m3'],
    [14336, 'gluE4m3'],
    [1536, 'gluE4m3Many'],
    [25600, 'gluE4m3Many'],
  ] as const) {
    const rows = 3
    const { numbers, sums, by, tokens } = product(rows, 2 * width)
    for (const narrow of [true, false]) {
      for (const gelu of [0, 1]) {
        const [out, scales] = [gpu.poisoned(rows * width * 2), gpu.poisoned(rows * 2)]
        const args = [sums, out, width, gelu, narrow ? scales : 0, by, tokens]
        gpu.run('glu.cu', kernel, 'aaiiaaa', args, [rows], rowThreads(width))
        const want = Float32Array.from({ length: rows * width }, (_, i) => {
          const at = Math.floor(i / width) * 2 * width + (i % width)
          const g = numbers[at]!
          const act = gelu
            ? 0.5 * g * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (g + 0.044715 * g ** 3)))
            : g / (1 + Math.exp(-g))
          return act * numbers[at + width]!
        })
        if (!narrow) close(gpu.bf16(out, want.length), want, BF16_ERROR, `${width}`)
        else {
          const { bytes, scales: by } = rowsAt(out, scales, rows, width)
          const got = Float32Array.from(bytes, (b, i) => fromE4m3(b) * by[Math.floor(i / width)]!)
          close(got, want, E4M3_ERROR, `${width}, e4m3`)
        }
      }
    }
  }
})

test('a product of e4m3 is not that of its operands', () => {
  const matmuls = new Matmuls(
    gpu.driver,
    loadCublasLt(),
    gpu.device.info,
    temporaryDirectory('products'),
  )
  for (const [m, k, n] of [
    [64, 14336, 1],
    [48, 4096, 4],
    [208, 64, 64],
    [4096, 176, 48],
  ] as const) {
    const bytes = (count: number) => Uint8Array.from({ length: count }, () => byte())
    const [w, x] = [bytes(m * k), bytes(n * k)]
    const out = gpu.poisoned(m * n * 2)
    const shape = { m, k, stride: m, float32: false, accumulate: false, e4m3: true }
    matmuls.run(shape, n, n, gpu.put(w), gpu.put(x), out, gpu.stream)
    const [a, b] = [w, x].map((of) => Float64Array.from(of, fromE4m3)) as [
      Float64Array,
      Float64Array,
    ]
    const want = new Float64Array(m * n)
    for (let t = 0; t < n; t++) {
      for (let r = 0; r < m; r++) {
        let sum = 0
        for (let i = 0; i < k; i++) sum += a[r * k + i]! * b[t * k + i]!
        want[t * m + r] = sum
      }
    }
    // Tensor cores keep about 14 bits of a sum, and bf16 keeps 8.
    close(gpu.bf16(out, m * n), want, BF16_ERROR, `${m} × ${k} × ${n}`)
  }
  matmuls.close()
})

/** A number, not too far from one. */
function byte(): number {
  return (random.below(2) << 7) | (40 + random.below(32))
}

const SLOTS = 5
/** In the mean; transformers whose linear layers round their operands so: 0.06, Gemma 3 0.1. */
const MEAN_ERROR = 0.14
/**
 * KL of float32's next-token distributions and those of transformers in float32 whose linear layers
 * round their operands to e4m3 with the same scales: nats, mean of a golden's whole positions.
 */
const KL_OF_ROUNDING: Readonly<Record<(typeof FAMILIES)[number], number>> = {
  llama2: 1.8e-3,
  llama3: 2.6e-3,
  'llama-biased': 2.2e-2,
  mistral: 4.5e-6,
  qwen2: 4.3e-3,
  qwen3: 6.3e-3,
  'qwen3-yarn': 5.6e-6,
  gemma3: 6.1e-3,
  'gemma3-scaled': 3.7e-3,
}
/** bf16 rounds other things, and a few positions make most of a mean. */
const KL_SLACK = 3

for (const family of FAMILIES) {
  test(`${family}: answers in fp8 are further off than four bits explain`, (t) => {
    const golden = new Golden(family)
    const longest = Math.max(...golden.sequences.map(({ tokens }) => tokens.length))
    const layout = gpuKvLayout(golden.model.config, longest + 3, 2 << 20)
    const kv = new PlainKv(gpu.driver, layout, SLOTS)
    kv.fill(0x7fc0, gpu.stream)
    const backend = new CudaBackend(golden.model, {
      device: gpu.device,
      modules: gpu.modules,
      kv,
      tune: false,
      quantization: 'fp8',
      maxSequences: SLOTS,
      stepTokens: 704,
      ...reference(golden, layout),
    })
    t.after(() => backend.close())
    const batch = new StepBatch(704, SLOTS)
    const errors: number[] = []
    const divergences: number[] = []
    const lengths = new Map<number, number>()
    const step = (...parts: [slot: number, sequence: number, count: number][]) => {
      batch.clear()
      for (const [slot, sequence, count] of parts) {
        const from = lengths.get(slot) ?? 0
        batch.add(slot, from, golden.sequence(sequence).tokens, from, count, true)
        lengths.set(slot, from + count)
      }
      backend.launch(batch)
      const rows = backend.collect()
      parts.forEach(([slot, sequence], i) => {
        const position = lengths.get(slot)! - 1
        errors.push(golden.error(sequence, position, rows[i]!))
        const want = golden.sequence(sequence).whole.get(position)
        if (want) divergences.push(divergence(want, rows[i]!))
      })
    }
    step([0, 0, 40], [1, 1, 12], [2, 2, 1])
    for (let i = 0; i < 16; i++) step([0, 0, 1], [1, 1, 1], [2, 2, 1])
    for (let i = 0; i < 8; i++) step([1, 1, 1])
    for (let i = 0; i < 4; i++) step([1, 1, 1], [2, 2, 1])
    for (const sequence of [0, 1, 2]) {
      for (const position of [...golden.sequence(sequence).whole.keys()].toSorted(
        (a, b) => a - b,
      )) {
        lengths.set(3, 0)
        step([3, sequence, position + 1])
      }
    }
    const mean = (values: number[]) => values.reduce((sum, x) => sum + x, 0) / values.length
    const kl = mean(divergences)
    const said = `relative error ${mean(errors).toFixed(3)}, KL ${kl.toExponential(1)}`
    t.diagnostic(`${family}: ${said}, of ${errors.length} and ${divergences.length}`)
    const most = KL_SLACK * KL_OF_ROUNDING[family]
    assert.ok(mean(errors) <= MEAN_ERROR && kl <= most, said)
  })
}

/** Heads that no fast attention takes have the plain one. */
function reference(golden: Golden, layout: ReturnType<typeof gpuKvLayout>) {
  if (FAST.includes(golden.model.config.headDim)) return {}
  const { config } = golden.model
  return {
    attention: (state: StepState, find: KernelFinder) =>
      new ReferenceAttention(gpu.driver, config, layout, state, find),
  }
}

const FAST = [64, 96, 128, 256]

/** KL(want ‖ got) of two rows of logits, in nats. */
function divergence(want: Float32Array, got: Float32Array): number {
  const norm = (row: Float32Array) => {
    const max = Math.max(...row)
    return max + Math.log(row.reduce((sum, x) => sum + Math.exp(x - max), 0))
  }
  const [p, q] = [norm(want), norm(got)]
  return want.reduce((sum, x, i) => sum + Math.exp(x - p) * (x - p - (got[i]! - q)), 0)
}
