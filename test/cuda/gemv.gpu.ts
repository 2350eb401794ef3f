// Catches a product of few tokens that is wrong in any of its forms.

import { after, test } from 'node:test'
import {
  type GemvEpilogue,
  gemvBlocks,
  gemvSharedBytes,
  gemvVariant,
} from '../../src/backends/cuda/gemv.ts'
import { compileAhead } from '../../src/backends/cuda/compile-ahead.ts'
import { fromE4m3, quantised } from '../support/e4m3.ts'
import { BF16_ERROR, close, Gpu, Random, randomBf16, toBf16 } from './gpu.ts'

const gpu = new Gpu()
after(() => gpu[Symbol.dispose]())
const random = new Random(13)

const KINDS = 'aiaafiaiaiaaaiifiiiaa'
const SHAPES = [
  [64, 90],
  [576, 2000],
  [1536, 130],
  [4096, 778],
  [14336, 266],
] as const

const CASES = (['store', 'add', 'glu', 'logits'] as const).flatMap((epilogue) =>
  SHAPES.flatMap(([k, rows]) =>
    [1, 2, 4].flatMap((tokens) =>
      [false, true].flatMap((e4m3) => {
        const variant = gemvVariant(k, tokens, epilogue, k < 10000, e4m3)
        return variant ? [{ epilogue, k, rows, tokens, e4m3, variant }] : []
      }),
    ),
  ),
)

const kernels = CASES.map(({ variant: { defines } }) => ({ file: 'gemv.cu', defines }))
compileAhead(gpu.modules, kernels, gpu.device.architecture)

for (const { epilogue, k, rows, tokens, e4m3 } of CASES) {
  const odd = epilogue === 'logits' && !e4m3 ? 1 : 0
  test(`${epilogue} of ${tokens} tokens by [${rows}, ${k}]${e4m3 ? ' of e4m3' : ''} is wrong`, () =>
    check(epilogue, k, rows + odd, tokens, e4m3))
}

interface Weights {
  values: Float32Array
  /** On the device. */
  address: number
  scales: number | undefined
}

const made = new Map<string, Weights>()

/** Each matrix is made once: that takes longer than all products with it. */
function weightsOf(k: number, rows: number, e4m3: boolean): Weights {
  const key = `${k} ${rows} ${e4m3}`
  let weights = made.get(key)
  if (weights) return weights
  const bf16 = randomBf16(random, rows * k, 1 / Math.sqrt(k))
  const narrow = e4m3 ? narrowed(bf16, k) : undefined
  const address = gpu.put(narrow?.bytes ?? toBf16(bf16))
  const scales = narrow && gpu.put(toBf16(narrow.scales))
  weights = { values: narrow?.values ?? bf16, address, scales }
  made.set(key, weights)
  return weights
}

function check(epilogue: GemvEpilogue, k: number, rows: number, tokens: number, e4m3 = false) {
  const norm = k < 10000
  const variant = gemvVariant(k, tokens, epilogue, norm, e4m3)!
  const weights = weightsOf(k, rows, e4m3)
  const x = randomBf16(random, tokens * k, 2)
  const normWeight = Float32Array.from({ length: k }, () => random.next() + 0.5)
  const bias = Float32Array.from({ length: rows }, () => random.next())
  const biased = epilogue !== 'logits' && epilogue !== 'glu'
  const width = epilogue === 'glu' ? rows / 2 : rows
  const start = randomBf16(random, tokens * width)
  const size = epilogue === 'logits' ? 4 : 2
  const out = epilogue === 'add' ? gpu.put(toBf16(start)) : gpu.poisoned(tokens * width * size)
  const blocks = gemvBlocks(variant, rows, 132)
  const args = [weights.address, rows, gpu.put(toBf16(x)), gpu.put(normWeight), 1e-5, 3]
  args.push(out, width, biased ? gpu.put(bias) : 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 0, 0)
  if (weights.scales !== undefined) args.push(weights.scales)
  const shared = gemvSharedBytes(variant, rows, blocks)
  const options = { shared, defines: variant.defines }
  gpu.run('gemv.cu', 'gemv', e4m3 ? `${KINDS}a` : KINDS, args, [blocks], variant.threads, options)
  const want: number[] = []
  for (let t = 0; t < tokens; t++) {
    const row = Float64Array.from(x.subarray(t * k, (t + 1) * k))
    if (norm) {
      const rms = Math.sqrt(row.reduce((sum, v) => sum + v * v, 0) / k + 1e-5)
      row.forEach((v, i) => (row[i] = (v / rms) * normWeight[i]!))
    }
    const products = productsOf(weights.values, row)
    if (biased) bias.forEach((b, r) => (products[r]! += b))
    for (let i = 0; i < width; i++) {
      const y = products[i]!
      if (epilogue === 'glu') want.push((y / (1 + Math.exp(-y))) * products[i + width]!)
      else want.push(epilogue === 'add' ? y + start[t * width + i]! : y)
    }
  }
  const count = tokens * width
  const got = epilogue === 'logits' ? gpu.get(out, new Float32Array(count)) : gpu.bf16(out, count)
  close(got, want, BF16_ERROR, 'product')
}

/** Of all rows of a matrix with one row, in float64. */
function productsOf(matrix: Float32Array, x: Float64Array): Float64Array {
  const products = new Float64Array(matrix.length / x.length)
  for (let r = 0, at = 0; r < products.length; r++) {
    let sum = 0
    for (let i = 0; i < x.length; i++) sum += matrix[at++]! * x[i]!
    products[r] = sum
  }
  return products
}

/** Rows as e4m3, and the numbers that they stand for. */
function narrowed(values: Float32Array, k: number) {
  const bytes = new Uint8Array(values.length)
  const scales = new Float32Array(values.length / k)
  for (let r = 0; r < scales.length; r++) {
    // Rows of other sizes, so that another row's scale shows.
    const row = values.subarray(r * k, (r + 1) * k).map((x) => x * (1 + (r % 3)))
    const made = quantised(row)
    bytes.set(made.bytes, r * k)
    scales[r] = made.scale
  }
  const of = new Float32Array(bytes.length)
  for (let i = 0; i < of.length; i++) of[i] = fromE4m3(bytes[i]!) * scales[Math.floor(i / k)]!
  return { bytes, scales, values: of }
}
