// Catches a kernel that moves or norms rows wrongly, or leaves some of them out.

import assert from 'node:assert/strict'
import { after, test } from 'node:test'
import { BF16_ERROR, close, Gpu, Random, randomBf16, toBf16 } from './gpu.ts'

const gpu = new Gpu()
after(() => gpu[Symbol.dispose]())
const random = new Random(11)

test('an embedding row of the wrong token, or unscaled', () => {
  const [vocab, width, rows] = [37, 72, 13]
  const table = randomBf16(random, vocab * width)
  const tokens = Int32Array.from({ length: rows }, () => random.below(vocab))
  for (const scale of [1, 8.5]) {
    const out = gpu.poisoned(rows * width * 2)
    const args = [gpu.put(toBf16(table)), gpu.put(tokens), out, width, vocab, scale]
    gpu.run('embed.cu', 'embed', 'aaaiif', args, [rows], 96)
    const want = Array.from(tokens, (t) =>
      Array.from(table.subarray(t * width, (t + 1) * width), (x) => x * scale),
    ).flat()
    close(gpu.bf16(out, rows * width), want, scale === 1 ? 0 : BF16_ERROR, `scale ${scale}`)
  }
  const bad = gpu.poisoned(width * 2)
  const args = [gpu.put(toBf16(table)), gpu.put(Int32Array.of(vocab)), bad, width, vocab, 1]
  gpu.run('embed.cu', 'embed', 'aaaiif', args, [1], 96)
  assert.ok(gpu.bf16(bad, width).every(Number.isNaN), 'an unknown token is no number')
})

function rms(row: Float32Array, eps: number): number {
  return Math.sqrt(row.reduce((sum, x) => sum + x * x, 0) / row.length + eps)
}

test('a norm, or a sum before it, is wrong', () => {
  const eps = 1e-5
  for (const [rows, width] of [
    [1, 4096],
    [5, 64],
    [3, 576],
    [2, 8200],
    [7, 2304],
  ] as const) {
    const x = randomBf16(random, rows * width, 3)
    const added = randomBf16(random, rows * width, 0.5)
    const weight = Float32Array.from({ length: width }, () => 0.5 + random.next())
    const post = Float32Array.from({ length: width }, () => 0.5 + random.next())
    for (const mode of ['norm', 'add', 'post', 'sum only'] as const) {
      const inOut = gpu.put(toBf16(x))
      const out = gpu.poisoned(rows * width * 2)
      const args = [
        inOut,
        mode === 'norm' ? 0 : gpu.put(toBf16(added)),
        mode === 'post' ? gpu.put(post) : 0,
        gpu.put(weight),
        mode === 'sum only' ? 0 : out,
        width,
        eps,
      ]
      // As few and as many rows have them.
      const threads = Math.min(1024, Math.ceil(width / (rows > 1 ? 16 : 8) / 32) * 32)
      gpu.run('norm.cu', 'normRow', 'aaaaaif', args, [rows], threads)
      const sums: number[] = []
      const normed: number[] = []
      for (let r = 0; r < rows; r++) {
        const a = added.subarray(r * width, (r + 1) * width)
        const scale = mode === 'post' ? 1 / rms(a, eps) : 1
        const sum = x
          .slice(r * width, (r + 1) * width)
          .map((v, i) =>
            mode === 'norm' ? v : v + a[i]! * scale * (mode === 'post' ? post[i]! : 1),
          )
        sums.push(...sum)
        const divisor = rms(sum, eps)
        normed.push(...sum.map((v, i) => (v / divisor) * weight[i]!))
      }
      close(gpu.bf16(inOut, rows * width), sums, BF16_ERROR, `${mode} ${width}: sum`)
      if (mode !== 'sum only') close(gpu.bf16(out, rows * width), normed, BF16_ERROR, mode)
    }
  }
})

test('a gate or its activation is wrong', () => {
  for (const [rows, width] of [
    [1, 14336],
    [3, 40],
    [9, 1536],
  ] as const) {
    const input = randomBf16(random, rows * 2 * width, 2)
    for (const gelu of [0, 1]) {
      const out = gpu.poisoned(rows * width * 2)
      const args = [gpu.put(toBf16(input)), out, width, gelu]
      gpu.run('glu.cu', 'glu', 'aaii', args, [Math.ceil(width / 8 / 256), rows], 256)
      const want: number[] = []
      for (let r = 0; r < rows; r++) {
        for (let i = 0; i < width; i++) {
          const g = input[r * 2 * width + i]!
          const act = gelu
            ? 0.5 * g * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (g + 0.044715 * g ** 3)))
            : g / (1 + Math.exp(-g))
          want.push(act * input[r * 2 * width + width + i]!)
        }
      }
      close(gpu.bf16(out, rows * width), want, BF16_ERROR, `${width} gelu ${gelu}`)
    }
  }
})

test('rows are selected, summed or biased wrongly', () => {
  const [rows, width] = [11, 200]
  const a = randomBf16(random, rows * width)
  const b = randomBf16(random, rows * width)
  const index = Int32Array.of(10, 0, 3, 3)
  const picked = gpu.poisoned(index.length * width * 2)
  const pick = [gpu.put(toBf16(a)), gpu.put(index), picked, width]
  gpu.run('rows.cu', 'selectRows', 'aaai', pick, [index.length], 32)
  const want = Array.from(index, (i) => [...a.subarray(i * width, (i + 1) * width)]).flat()
  close(gpu.bf16(picked, want.length), want, 0, 'selected')

  const sum = gpu.poisoned(rows * width * 2)
  const groups = (rows * width) / 8
  const add = [gpu.put(toBf16(a)), gpu.put(toBf16(b)), sum, groups]
  gpu.run('rows.cu', 'addRows', 'aaaa', add, [Math.ceil(groups / 256)], 256)
  close(
    gpu.bf16(sum, rows * width),
    a.map((x, i) => x + b[i]!),
    BF16_ERROR,
    'sum',
  )

  const bias = Float32Array.from({ length: 40 }, () => random.next())
  const biased = gpu.put(toBf16(a))
  gpu.run('rows.cu', 'addBias', 'aaii', [biased, gpu.put(bias), 40, width], [rows], 64)
  const wanted = a.map((x, i) => (i % width < 40 ? x + bias[i % width]! : x))
  close(gpu.bf16(biased, rows * width), wanted, BF16_ERROR, 'bias')
})
