// Catches a decode step of many tokens that is shared out unevenly, to blocks that are not there,
// or in parts that the kernel cannot do; and a table that says something else than the plan.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { present } from '../../assert.ts'
import { programFor } from '../../model/arch/programs.ts'
import { dummyModel } from '../../model/dummy.ts'
import {
  arrivalsOf,
  batchColumns,
  type BatchPlan,
  batchVariant,
  columnsUpTo,
  planBatch,
} from './batch-plan.ts'
import { BatchTable } from './batch-table.ts'
import { type Phase, planStep } from './decode-step.ts'
import { fuse, fuseSkinny } from './fuse.ts'

const BLOCKS = 132
const ROOM = 227 << 10

function modelOf(name: string) {
  const model = dummyModel(name)
  const phases = planStep(fuseSkinny(fuse(programFor(model), true)))
  assert.ok(!('reason' in phases), name)
  const matrix = (names: readonly string[]) => {
    const shapes = names.map((one) => present(model.tensors.get(one)?.shape, one))
    return {
      rows: shapes.reduce((sum, [, count = 0]) => sum + count, 0),
      k: present(shapes[0]?.[0], 'a row'),
    }
  }
  return { config: model.config, phases, matrix }
}

function planOf(name: string, e4m3 = false): BatchPlan {
  const { config, phases, matrix } = modelOf(name)
  const narrow = (weights: readonly string[]) => ({
    ...matrix(weights),
    e4m3: e4m3 && inBlock(weights),
  })
  const plan = planBatch(phases, config, narrow, BLOCKS, true)
  assert.ok(!('reason' in plan), name)
  return plan
}

function inBlock([name]: readonly string[]): boolean {
  return name?.startsWith('blk.') ?? false
}

for (const [name, e4m3] of [
  ['dummy:llama-3.1-8b', false],
  ['dummy:llama-3.2-1b', false],
  ['dummy:llama-3.1-8b', true],
  ['dummy:llama-3.2-1b', true],
] as const) {
  const what = `${name}${e4m3 ? ', fp8' : ''}`
  test(`${what}: blocks read unequal parts, or parts that the kernel has no room for`, () => {
    const { matrix } = modelOf(name)
    const { phases, sharings } = planOf(name, e4m3)
    sharings.forEach((sharing, i) => {
      const { kind, weights } = present(phases[i], 'a phase')
      if (!sharing) return assert.equal(kind, 'attention')
      const { groups, steps, tiles, split } = sharing
      const elements = e4m3 && kind !== 'logits' ? 128 : 64
      assert.equal(steps, matrix(weights).k / elements, `${kind}: all of K`)
      assert.ok(tiles * split <= BLOCKS && tiles <= groups && steps >= split, kind)
      const busiest = Math.ceil(groups / tiles) * Math.ceil(steps / split)
      assert.ok((groups * steps) / BLOCKS / busiest > 0.94, `${kind}: ${busiest} for the busiest`)
      if (split > 1) assert.ok(Math.ceil(groups / tiles) <= (kind === 'add' ? 8 : 16), kind)
    })
  })
}

test('a variant takes more shared memory than a block has', () => {
  const { config } = modelOf('dummy:llama-3.1-8b')
  for (const [tokens, e4m3] of [
    [32, false],
    [64, false],
    [32, true],
    [64, true],
  ] as const) {
    const plan = planOf('dummy:llama-3.1-8b', e4m3)
    const variant = batchVariant(plan, config, tokens, BLOCKS, ROOM)
    assert.ok(!('reason' in variant))
    assert.equal(variant.defines['E4M3'], e4m3 ? 1 : undefined)
    // A kilobyte of it is static.
    assert.ok(variant.sharedBytes + 1024 <= ROOM)
    assert.ok(present(variant.defines['PAGES'], 'pages') >= 20)
  }
  const small = batchVariant(planOf('dummy:llama-3.1-8b'), config, 64, BLOCKS, 99 << 10)
  assert.ok('reason' in small)
})

test('a model whose blocks are small has steps of one kernel', () => {
  const { config, phases, matrix } = modelOf('dummy:llama-3.2-1b')
  const plan = planBatch(phases, config, matrix, BLOCKS)
  assert.deepEqual(plan, { reason: 'its blocks have 116 MiB of weights only' })
})

test('a model in fp8 is taken for one of bf16, or some of it is bf16', () => {
  const reasonOf = (name: string, e4m3: (weights: readonly string[]) => boolean) => {
    const { config, phases, matrix } = modelOf(name)
    const of = (weights: readonly string[]) => ({ ...matrix(weights), e4m3: e4m3(weights) })
    const plan = planBatch(phases, config, of, BLOCKS)
    return 'reason' in plan ? plan.reason : undefined
  }
  assert.equal(reasonOf('dummy:llama-3.1-8b', inBlock), undefined)
  assert.equal(reasonOf('dummy:llama-3.2-1b', inBlock), undefined)
  const mixed = reasonOf('dummy:llama-3.1-8b', ([name]) => !!name?.includes('ffn'))
  assert.equal(mixed, 'some of its matrices are fp8, others are not')
})

test('numbers of rows have no columns, or too few', () => {
  const columns = [1, 4, 5, 8, 32, 33, 64, 65].map(batchColumns)
  assert.deepEqual(columns, [undefined, undefined, 32, 32, 32, 64, 64, undefined])
  assert.deepEqual([4, 5, 32, 40, 512].map(columnsUpTo), [[], [32], [32], [32, 64], [32, 64]])
})

test('what the kernel cannot do is planned all the same', () => {
  const { config, phases, matrix } = modelOf('dummy:llama-3.1-8b')
  const plan = (change: (phase: Phase) => Phase, heads = config) =>
    planBatch(phases.map(change), heads, matrix, BLOCKS)
  assert.ok(!('reason' in plan((phase) => phase)))
  const broken: [string, (phase: Phase) => Phase][] = [
    ['stored', (phase) => (phase.kind === 'add' ? { ...phase, kind: 'store' } : phase)],
    ['no norm', (phase) => (phase.kind === 'glu' ? { ...phase, norm: undefined } : phase)],
    ['another product', (phase) => (phase.kind === 'add' ? { ...phase, in: 12345 } : phase)],
    ['another sum', (phase) => (phase.kind === 'glu' ? { ...phase, in: 12345 } : phase)],
    [
      'half of a head',
      (phase) => (phase.rope ? { ...phase, rope: { ...phase.rope, dimensions: 64 } } : phase),
    ],
  ]
  for (const [what, change] of broken) assert.ok('reason' in plan(change), what)
  assert.ok('reason' in plan((phase) => phase, { ...config, headDim: 96 }), 'heads of 96')
})

const KV_MAP = { dataType: 9, address: 0x3000, dimensions: [128], strides: [], box: [64] }
const INPUTS = { first: 0x6000, add: 0x6001, attention: 0x6002, glu: 0x6003 }

/** The table for a plan, and how it is read. */
function tableOf(plan: BatchPlan) {
  const { config, matrix } = modelOf('dummy:llama-3.1-8b')
  const table = new BatchTable(plan, {
    ...{ blocks: BLOCKS, config, tokens: 64, logits: 0x7000, inputs: INPUTS },
    place: (value) => ({ address: 0x100000 * (value + 1), stride: 4096, width: 4096 }),
    matrix: (names) => {
      const scales = plan.e4m3 && inBlock(names) ? 0x2000 : 0
      return { address: 0x5000, ...matrix(names), scales }
    },
    vector: () => 0x4000,
    layerStride: 4096,
    kvMaps: { tile: KV_MAP, warp: { ...KV_MAP, box: [16] } },
  })
  const view = new DataView(new ArrayBuffer(table.bytes))
  const mapsAt = 0x900000
  table.write(view, mapsAt)
  const address = (phase: number, i: number) => Number(view.getBigUint64(phase * 128 + i * 8, true))
  const integer = (phase: number, i: number) => view.getInt32(phase * 128 + 64 + i * 4, true)
  const mapOf = (phase: number, i: number) => table.maps[(address(phase, i) - mapsAt) / 128]
  return { address, integer, mapOf, matrix }
}

test('the table has other addresses, counts or maps than the plan', () => {
  const plan = planOf('dummy:llama-3.1-8b')
  const { address, integer, mapOf, matrix } = tableOf(plan)
  plan.phases.forEach((phase, i) => {
    const sharing = plan.sharings[i]
    assert.equal(integer(i, 8), i === 0 ? 0 : arrivalsOf(plan, i - 1, BLOCKS))
    const { kind } = phase
    const written = kind === 'attention' || kind === 'glu' ? address(i, 3) : undefined
    assert.equal(written, kind === 'attention' || kind === 'glu' ? INPUTS[kind] : undefined)
    if (kind === 'add') assert.equal(address(i, 4), INPUTS.add)
    if (!sharing) {
      assert.equal(integer(i, 13), phase.layer * 16)
      assert.equal(mapOf(i, 2)?.address, 0x3000)
      return assert.deepEqual([mapOf(i, 0)?.box, mapOf(i, 2)?.box], [[64], [16]])
    }
    const { rows, k } = matrix(phase.weights)
    const [four, one, input] = [mapOf(i, 0), mapOf(i, 1), mapOf(i, 2)]
    assert.deepEqual(four?.box, [64, 8, 2, 4, 1])
    assert.deepEqual(one?.box, [64, 8, 2, 1, 1])
    assert.equal(
      four?.dimensions.reduce((a, b) => a * b),
      rows * k,
      'every element once',
    )
    // What one phase writes the next one reads: 64 elements of all tokens lie together.
    const before = plan.phases[i - 1]?.kind
    const maker = before === 'attention' || before === 'glu' || before === 'add' ? before : 'first'
    assert.equal(input?.address, INPUTS[maker])
    assert.deepEqual(input?.dimensions, [64, 64, k / 64])
    assert.deepEqual(input?.strides, maker === 'first' ? [2 * k, 128] : [128, 8192])
    assert.equal(maker === 'add' || maker === 'first', phase.norm !== undefined, 'normed rows')
    // Of a norm: the sums of squares of the tiles that the sum before it had.
    const squares = phase.norm && i > 0 ? present(plan.sharings[i - 1], 'a sum').tiles : 0
    assert.deepEqual([integer(i, 9), integer(i, 3)], [squares, sharing.tiles])
    assert.equal(address(i, 4) !== 0, phase.kind === 'add')
  })
})

test('matrices of fp8 are read as others, unscaled, or next to rows in another order', () => {
  const plan = planOf('dummy:llama-3.1-8b', true)
  const { address, integer, mapOf, matrix } = tableOf(plan)
  plan.phases.forEach(({ kind, weights }, i) => {
    if (kind === 'attention') return
    const narrow = kind !== 'logits'
    assert.equal(address(i, 6), narrow ? 0x2000 : 0, 'scales')
    const { rows, k } = matrix(weights)
    for (const map of [mapOf(i, 0), mapOf(i, 1)]) {
      assert.deepEqual([map?.dataType, map?.box[0]], narrow ? [0, 128] : [9, 64], kind)
      assert.equal(map?.strides[0], narrow ? k : 2 * k)
      assert.equal(
        map?.dimensions.reduce((a, b) => a * b),
        rows * k,
      )
    }
    const input = mapOf(i, 2)
    assert.deepEqual([input?.dataType, input?.box], [9, [64, 64, 1]], 'tokens are bf16')
    const last = plan.phases[i + 1]?.kind === 'logits'
    assert.equal(integer(i, 15), kind === 'add' && !last ? 1 : 0, 'evens first')
  })
})
