// Catches a product of 5–128 tokens by own kernels that is wrong in any of its forms, splits or
// sizes, and one that writes where it must not.

import { after, test } from 'node:test'
import { hopperLaunch } from '../../src/backends/cuda/hopper-launch.ts'
import { type HopperShape, hopperVariants } from '../../src/backends/cuda/hopper-products.ts'
import type { GemvEpilogue } from '../../src/backends/cuda/gemv.ts'
import { BF16_ERROR, close, Gpu, Random, randomBf16, toBf16 } from './gpu.ts'

const gpu = new Gpu()
after(() => gpu[Symbol.dispose]())
const random = new Random(17)
const { info } = gpu.device
const skip = info.capability === 90 ? false : 'made for compute capability 9.0'

/** Rows, elements of a row, tokens: no multiples of tiles, boxes or steps among most of them. */
const SHAPES = [
  [778, 200, 5],
  [90, 1000, 17],
  [1538, 576, 33],
  [4096, 776, 63],
  [640, 4096, 64],
  [258, 328, 100],
] as const

for (const epilogue of ['store', 'add', 'glu', 'logits'] as const) {
  for (const [rows, k, tokens] of SHAPES) {
    test(`${epilogue} of ${tokens} tokens by [${rows}, ${k}] is wrong`, { skip }, () =>
      check(epilogue, rows + (epilogue === 'logits' ? 1 : 0), k, tokens),
    )
  }
}

/** float64, or as near as needed: [tokens, rows]. */
function products(weight: Float32Array, x: Float32Array, k: number, rows: number): Float64Array {
  const tokens = x.length / k
  const out = new Float64Array(tokens * rows)
  for (let t = 0; t < tokens; t++) {
    for (let r = 0; r < rows; r++) {
      let sum = 0
      for (let i = 0; i < k; i++) sum += weight[r * k + i]! * x[t * k + i]!
      out[t * rows + r] = sum
    }
  }
  return out
}

function variantsOf(shape: HopperShape) {
  return hopperVariants(shape, info.multiprocessors, info.sharedBytesPerBlock)
}

const NO_HEADS = { heads: 0, kvHeads: 0, headDim: 0 }
const NO_ROPE = { positions: 0, slots: 0, frequencies: 0, magnitude: 1 }

function check(epilogue: GemvEpilogue, rows: number, k: number, tokens: number): void {
  const weight = randomBf16(random, rows * k, 1 / Math.sqrt(k))
  const x = randomBf16(random, tokens * k, 2)
  const width = epilogue === 'glu' ? rows / 2 : rows
  const start = randomBf16(random, tokens * width)
  const y = products(weight, x, k, rows)
  const want = Float64Array.from({ length: tokens * width }, (_, at) => {
    const t = Math.floor(at / width)
    const i = at % width
    const value = y[t * rows + i]!
    if (epilogue === 'glu') return (value / (1 + Math.exp(-value))) * y[t * rows + i + width]!
    return epilogue === 'add' ? value + start[at]! : value
  })
  const size = epilogue === 'logits' ? 4 : 2
  const addresses = { weight: gpu.put(toBf16(weight)), x: gpu.put(toBf16(x)) }
  for (const variant of variantsOf({ rows, k, tokens, epilogue, headDim: 0 })) {
    const bytes = tokens * width * size
    const out = epilogue === 'add' ? gpu.put(toBf16(start)) : gpu.poisoned(bytes)
    const launch = hopperLaunch(gpu.driver, gpu.kernels.find, info.sharedBytesPerBlock, variant, {
      ...{ weight: addresses.weight, rows, k, tokens, epilogue, gelu: false },
      x: { address: addresses.x, stride: k, rows: tokens },
      out: { address: out, stride: width },
      ...{ ...NO_ROPE, heads: NO_HEADS, tokenStride: 0, layerOffset: 0 },
    })
    gpu.driver.launch(launch, gpu.stream)
    gpu.driver.synchronizeStream(gpu.stream)
    const count = tokens * width
    const got = size === 4 ? gpu.get(out, new Float32Array(count)) : gpu.bf16(out, count)
    close(got, want, BF16_ERROR, `${JSON.stringify(variant)}: product`)
  }
}

for (const headDim of [64, 128, 256]) {
  test(`q, k and v of heads of ${headDim} are not turned or not where they belong`, { skip }, () =>
    checkRope(headDim),
  )
}

function checkRope(headDim: number): void {
  const heads = { heads: 6, kvHeads: 2, headDim }
  const [k, tokens, slotTokens] = [328, 37, 50]
  const rows = 10 * headDim
  const weight = randomBf16(random, rows * k, 1 / Math.sqrt(k))
  const x = randomBf16(random, tokens * k, 2)
  const y = products(weight, x, k, rows)
  const frequencies = Float32Array.from({ length: headDim / 2 }, (_, i) => 10 ** (-i / headDim))
  const positions = Int32Array.from({ length: tokens }, () => random.below(slotTokens))
  const tokenStride = 3 * 4 * headDim * 2
  const layerOffset = 4 * headDim * 2
  const slotBytes = slotTokens * tokenStride
  const addresses = {
    ...{ weight: gpu.put(toBf16(weight)), x: gpu.put(toBf16(x)) },
    ...{ positions: gpu.put(positions), frequencies: gpu.put(frequencies) },
  }
  const padding = 11
  const q: number[] = []
  const kv: number[] = []
  for (let t = 0; t < tokens; t++) {
    for (let head = 0; head < 10; head++) {
      for (let i = 0; i < headDim; i++) {
        const pair = i % (headDim / 2)
        const at = t * rows + head * headDim
        const [a, b] = [y[at + pair]!, y[at + pair + headDim / 2]!]
        const angle = positions[t]! * frequencies[pair]!
        const turned =
          i < headDim / 2
            ? a * Math.cos(angle) - b * Math.sin(angle)
            : a * Math.sin(angle) + b * Math.cos(angle)
        const value = head < 8 ? turned * (t === padding ? 0 : 1) : y[at + i]!
        if (head < 6) q.push(value)
        else if (t !== padding) kv.push(value)
      }
    }
  }
  for (const variant of variantsOf({ rows, k, tokens, epilogue: 'rope', headDim })) {
    const memory = gpu.poisoned(tokens * slotBytes)
    const slots = BigUint64Array.from({ length: tokens }, (_, t) =>
      t === padding ? 0n : BigInt(memory + t * slotBytes),
    )
    const out = gpu.put(new Uint16Array(tokens * 6 * headDim))
    const launch = hopperLaunch(gpu.driver, gpu.kernels.find, info.sharedBytesPerBlock, variant, {
      ...{ weight: addresses.weight, rows, k, tokens, epilogue: 'rope', gelu: false },
      x: { address: addresses.x, stride: k, rows: tokens },
      out: { address: out, stride: 6 * headDim },
      ...{ positions: addresses.positions, slots: gpu.put(slots), magnitude: 1 },
      ...{ frequencies: addresses.frequencies, heads, tokenStride, layerOffset },
    })
    gpu.driver.launch(launch, gpu.stream)
    gpu.driver.synchronizeStream(gpu.stream)
    const what = JSON.stringify(variant)
    close(gpu.bf16(out, q.length), q, BF16_ERROR, `${what}: q`)
    const all = gpu.bf16(memory, (tokens * slotBytes) / 2)
    const rowsOfKv: number[] = []
    for (let t = 0; t < tokens; t++) {
      if (t === padding) continue
      const at = (t * slotBytes + positions[t]! * tokenStride + layerOffset) / 2
      rowsOfKv.push(...all.subarray(at, at + 4 * headDim))
    }
    close(rowsOfKv, kv, BF16_ERROR, `${what}: k and v`)
    const written = all.reduce((count, value) => count + (Number.isNaN(value) ? 0 : 1), 0)
    if (written !== kv.length) throw new Error(`${what}: ${written} of ${kv.length} were written`)
  }
}
