// Catches attention that is wrong for a shape, a length, a window or a way of cutting the work;
// that reads a token it should not, or memory that is not mapped; that leaves an output unwritten.

import assert from 'node:assert/strict'
import { after, test } from 'node:test'
import { type AttentionShape, CudaAttention } from '../../src/backends/cuda/attention.ts'
import { attend, LAYER, MappedKv, shuffle } from './attention.ts'
import { BF16_ERROR, close, Gpu, Random, randomBf16, toBf16 } from './gpu.ts'

const gpu = new Gpu()
after(() => gpu[Symbol.dispose]())

/** [heads, kvHeads, headDim] */
const SHAPES = [
  [32, 8, 128],
  [9, 3, 64],
  [14, 2, 64],
  [8, 8, 96],
  [12, 2, 96],
  [4, 1, 256],
  [8, 4, 256],
  [16, 1, 128],
] as const
const LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 333, 700, 129]
const WINDOWS = [undefined, 100]
/** [position of the first token, tokens] */
const SEGMENTS = [
  [0, 200],
  [0, 1],
  [333, 67],
  [0, 0],
  [17, 128],
  [600, 33],
  [1, 33],
] as const

for (const [heads, kvHeads, headDim] of SHAPES) {
  for (const window of WINDOWS) {
    const softcap = headDim === 256 && window ? 20 : undefined
    const shape = { heads, kvHeads, headDim, scale: headDim ** -0.5, softcap }
    const name = `${heads}/${kvHeads} heads of ${headDim}, ${window ? `window ${window}` : 'all'}`
    test(`decode is wrong: ${name}`, () => checkDecode(shape, window))
    test(`prefill is wrong: ${name}`, () => checkPrefill(shape, window))
  }
}

test('a captured decode does not see the lengths of its replay', () => {
  const shape = { heads: 32, kvHeads: 8, headDim: 128, scale: 0.1 }
  const random = new Random(3)
  using kv = new MappedKv(gpu, shape, [40, 500, 64], random)
  const attention = attentionOf(shape, kv, 3)
  const { driver, stream } = gpu
  const q = randomBf16(random, 3 * 32 * 128)
  const [out, slots] = [gpu.poisoned(q.length * 2), gpu.put(Int32Array.of(0, 1, 2))]
  const lengths = gpu.put(Int32Array.of(1, 1, 1))
  const rows = { q: gpu.put(toBf16(q)), out, slots, lengths, rows: 3 }
  driver.beginCapture(stream)
  attention.decode(stream, rows, LAYER)
  const graph = driver.endCapture(stream)
  const executable = driver.instantiate(graph)
  for (const now of [
    [40, 3, 64],
    [7, 500, 64],
  ]) {
    const fresh = gpu.put(Int32Array.from(now))
    driver.copyOnDevice(lengths, fresh, 12, stream)
    driver.launchGraph(executable, stream)
    const want = now.flatMap((n, r) => [...attend(shape, kv.content[r]!, part(q, r, 3), n - 1)])
    close(gpu.bf16(out, q.length), want, BF16_ERROR, `lengths ${now.join(', ')}`)
  }
  driver.destroyExecutable(executable)
  driver.destroyGraph(graph)
  attention.close()
})

function checkDecode(shape: AttentionShape, window: number | undefined): void {
  const random = new Random(11)
  using kv = new MappedKv(gpu, shape, LENGTHS, random)
  const order = LENGTHS.map((_, slot) => slot)
  shuffle(order, random)
  const rows = order.length
  const attention = attentionOf(shape, kv, rows)
  const width = shape.heads * shape.headDim
  const q = randomBf16(random, rows * width, 2)
  const slots = gpu.put(Int32Array.from(order))
  const lengths = gpu.put(Int32Array.from(order, (slot) => LENGTHS[slot]!))
  const want = order.flatMap((slot, row) => {
    const length = LENGTHS[slot]!
    if (length === 0) return Array<number>(width).fill(0)
    return [...attend(shape, kv.content[slot]!, part(q, row, rows), length - 1, window)]
  })
  const queries = gpu.put(toBf16(q))
  // Twice: the counters that the first launch used must be as they were.
  for (let round = 0; round < 2; round++) {
    const out = gpu.poisoned(q.length * 2)
    attention.decode(gpu.stream, { q: queries, out, slots, lengths, rows }, LAYER, window)
    const got = gpu.bf16(out, q.length)
    close(got, want, BF16_ERROR, `round ${round}`)
    const empty = order.indexOf(0)
    assert.ok(
      part(got, empty, rows).every((x) => x === 0),
      'a row of length 0 gives zeros',
    )
  }
  attention.close()
}

function checkPrefill(shape: AttentionShape, window: number | undefined): void {
  const random = new Random(12)
  const lengths = SEGMENTS.map(([start, count]) => start + count)
  using kv = new MappedKv(gpu, shape, lengths, random)
  const attention = attentionOf(shape, kv, 1)
  const order = SEGMENTS.map((_, slot) => slot)
  shuffle(order, random)
  // Rows before, between and behind the segments belong to nobody.
  const firstRows: number[] = []
  let total = 2
  for (const slot of order) {
    firstRows.push(total)
    total += SEGMENTS[slot]![1] + 1
  }
  const width = shape.heads * shape.headDim
  const q = randomBf16(random, total * width, 2)
  const out = gpu.poisoned(q.length * 2)
  const segments = {
    ...{ q: gpu.put(toBf16(q)), out, firstRows: gpu.put(Int32Array.from(firstRows)) },
    starts: gpu.put(Int32Array.from(order, (slot) => SEGMENTS[slot]![0])),
    counts: gpu.put(Int32Array.from(order, (slot) => SEGMENTS[slot]![1])),
    ...{ slots: gpu.put(Int32Array.from(order)), segments: order.length },
  }
  attention.prefill(gpu.stream, segments, LAYER, window)
  const got = gpu.bf16(out, q.length)
  const written = new Set<number>()
  order.forEach((slot, i) => {
    const [start, count] = SEGMENTS[slot]!
    const want: number[] = []
    const rows: number[] = []
    for (let t = 0; t < count; t++) {
      const row = firstRows[i]! + t
      written.add(row)
      rows.push(...part(got, row, total))
      want.push(...attend(shape, kv.content[slot]!, part(q, row, total), start + t, window))
    }
    if (count > 0) close(rows, want, BF16_ERROR, `${count} tokens from ${start} on`)
  })
  for (let row = 0; row < total; row++) {
    if (written.has(row)) continue
    assert.ok(part(got, row, total).every(Number.isNaN), `row ${row} is nobody's`)
  }
  attention.close()
}

function attentionOf(shape: AttentionShape, kv: MappedKv, rowsMax: number): CudaAttention {
  return new CudaAttention({ device: gpu.device, modules: gpu.modules, shape, kv, rowsMax })
}

/** Row `index` of `count` that lie one after another. */
function part(all: Float32Array, index: number, count: number): Float32Array {
  const width = all.length / count
  return all.subarray(index * width, (index + 1) * width)
}
