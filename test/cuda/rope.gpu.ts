// Catches a rotation, a head norm or an append that goes to the wrong place.

import assert from 'node:assert/strict'
import { after, test } from 'node:test'
import { BF16_ERROR, close, fromBf16, Gpu, Random, randomBf16, toBf16 } from './gpu.ts'

const gpu = new Gpu()
after(() => gpu[Symbol.dispose]())
const random = new Random(12)

interface Case {
  heads: number
  kvHeads: number
  headDim: number
  dimensions: number
  interleaved: boolean
  norm: boolean
}

const CASES: Case[] = [
  { heads: 4, kvHeads: 2, headDim: 128, dimensions: 128, interleaved: false, norm: false },
  { heads: 3, kvHeads: 1, headDim: 64, dimensions: 64, interleaved: true, norm: false },
  { heads: 6, kvHeads: 2, headDim: 256, dimensions: 256, interleaved: false, norm: true },
  { heads: 2, kvHeads: 2, headDim: 96, dimensions: 32, interleaved: false, norm: false },
  { heads: 5, kvHeads: 5, headDim: 32, dimensions: 16, interleaved: true, norm: true },
]

for (const shape of CASES) {
  for (const scaled of [false, true]) {
    const what = `${JSON.stringify(shape)}${scaled ? ', of a product of e4m3' : ''}`
    test(`q, k or v of ${what} is wrong or misplaced`, () => check(shape, scaled))
  }
}

/** @param scaled by row of the matrix and by token, as what a product of e4m3 leaves is to be */
function check(
  { heads, kvHeads, headDim, dimensions, interleaved, norm }: Case,
  scaled: boolean,
): void {
  const [rows, layers, layer, slots, tokens] = [4, 3, 1, 3, 20]
  const [queries, keys] = [heads * headDim, kvHeads * headDim]
  const stride = queries + 2 * keys
  const tokenStride = layers * 2 * keys * 2
  const slotStride = tokens * tokenStride
  const memory = gpu.poisoned(slots * slotStride)
  const product = randomBf16(random, rows * stride)
  const rowScales = fromBf16(toBf16(Float32Array.from({ length: stride }, () => random.next() + 1)))
  const tokenScales = fromBf16(toBf16(Float32Array.from({ length: rows }, () => random.next() + 1)))
  const input = product.map((x, i) =>
    scaled ? x * rowScales[i % stride]! * tokenScales[Math.floor(i / stride)]! : x,
  )
  const positions = Int32Array.of(0, 7, 19, 5)
  const slotOf = [0, 2, 1, -1]
  const bases = BigUint64Array.from(slotOf, (s) => (s < 0 ? 0n : BigInt(memory + s * slotStride)))
  const frequencies = Float32Array.from({ length: dimensions / 2 }, (_, i) => 100 ** (-i / 20))
  const [magnitude, eps] = [1.25, 1e-6]
  const weights = [0, 1].map(() => Float32Array.from({ length: headDim }, () => random.next() + 1))
  const from = gpu.put(toBf16(product))
  const out = gpu.poisoned(rows * queries * 2)
  const args = [from, from + queries * 2, from + (queries + keys) * 2, stride, stride, out]
  args.push(gpu.put(positions), gpu.put(bases), gpu.put(frequencies), dimensions)
  args.push(interleaved ? 1 : 0, magnitude, ...weights.map((w) => (norm ? gpu.put(w) : 0)), eps)
  args.push(heads, kvHeads, headDim, tokenStride, layer * 2 * keys * 2)
  if (scaled) args.push(gpu.put(toBf16(rowScales)), gpu.put(toBf16(tokenScales)))
  const kinds = `aaaiiaaaaiifaafiiiaa${scaled ? 'aa' : ''}`
  const name = scaled ? 'ropeAppendScaled' : 'ropeAppend'
  // In one block a row, or in several.
  gpu.run('rope-append.cu', name, kinds, args, [rows, 1 + (heads % 3)], 128)

  const head = (row: number, at: number, position: number, weight: Float32Array | undefined) => {
    let x = Array.from(input.subarray(row * stride + at, row * stride + at + headDim))
    if (weight && norm) {
      const rms = Math.sqrt(x.reduce((sum, v) => sum + v * v, 0) / headDim + eps)
      x = x.map((v, i) => (v / rms) * weight[i]!)
    }
    if (!weight) return x
    const turned = [...x]
    for (let p = 0; p < dimensions / 2; p++) {
      const [i, j] = interleaved ? [2 * p, 2 * p + 1] : [p, p + dimensions / 2]
      const angle = Math.fround(position * frequencies[p]!)
      const [c, s] = [Math.cos(angle) * magnitude, Math.sin(angle) * magnitude]
      turned[i] = x[i]! * c - x[j]! * s
      turned[j] = x[i]! * s + x[j]! * c
    }
    return turned
  }
  const q = gpu.bf16(out, rows * queries)
  const kv = gpu.bf16(memory, (slots * slotStride) / 2)
  let written = 0
  for (let row = 0; row < 3; row++) {
    const position = positions[row]!
    const many = (count: number, at: number, weight: Float32Array | undefined) =>
      Array.from({ length: count }, (_, h) => head(row, at + h * headDim, position, weight)).flat()
    close(
      q.subarray(row * queries, (row + 1) * queries),
      many(heads, 0, weights[0]),
      BF16_ERROR,
      `q of row ${row}`,
    )
    const at = (slotOf[row]! * slotStride + position * tokenStride + layer * 2 * keys * 2) / 2
    const wanted = [
      ...many(kvHeads, queries, weights[1]),
      ...many(kvHeads, queries + keys, undefined),
    ]
    close(kv.subarray(at, at + 2 * keys), wanted, BF16_ERROR, `k and v of row ${row}`)
    written += 2 * keys
  }
  assert.equal(kv.filter((x) => !Number.isNaN(x)).length, written, 'nothing else is written')
  assert.ok(q.subarray(3 * queries).every(Number.isNaN), 'a row that pads writes nothing')
}
