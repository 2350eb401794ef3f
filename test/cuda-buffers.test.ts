// Catches values that share memory although one is read while the other is written: by nodes one by
// one, and by products whose blocks also do what follows them.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Buffers } from '../src/backends/cuda/buffers.ts'
import { fuse, fuseSkinny, makes, type Node, readsOf } from '../src/backends/cuda/fuse.ts'
import type { SkinnyNode } from '../src/backends/cuda/fuse.ts'
import { programFor } from '../src/model/arch/programs.ts'
import { dummyModel } from '../src/model/dummy.ts'
import type { Value } from '../src/model/program.ts'
import { FAMILIES, Golden } from './arch/golden.ts'

const ROWS = { tokens: 32, outputs: 8 }
const BF16 = 2
const MODELS = [
  ...FAMILIES.map((family) => new Golden(family).model),
  ...['llama-3.1-8b', 'llama-3.2-1b', 'qwen3-8b'].map((shape) => dummyModel(shape)),
]

function touches(node: Node | SkinnyNode): { reads: readonly Value[]; writes: readonly Value[] } {
  if (node.kind !== 'skinny') return { reads: readsOf(node), writes: makes(node) }
  const { linear, rope, glu } = node
  const sum = linear.kind === 'linear' && linear.accumulate ? linear.outs : []
  return { reads: [node.in, ...sum], writes: makes(rope ?? glu ?? linear) }
}

for (const model of MODELS) {
  for (const everyRow of [true, false]) {
    const what = `${model.config.name}${everyRow ? ', all rows outputs' : ''}`
    test(`${what}: a place is written while somebody reads it`, () => {
      const program = programFor(model)
      const nodes = fuse(program, everyRow)
      const buffers = new Buffers(nodes, program, ROWS)
      const rowsOf = new Map<Value, number>()
      for (const node of nodes) {
        const rows = 'rows' in node ? node.rows : node.kind === 'select' ? 'outputs' : 'tokens'
        for (const value of makes(node)) rowsOf.set(value, ROWS[rows])
      }
      const endOf = (value: Value) => {
        const { offset, stride, width } = buffers.place(value)
        return offset + (stride * (rowsOf.get(value)! - 1) + width) * BF16
      }
      const overlap = (a: Value, b: Value) =>
        buffers.place(a).offset < endOf(b) && buffers.place(b).offset < endOf(a)
      for (const some of [nodes, fuseSkinny(nodes), fuseSkinny(nodes, false)]) {
        for (const node of some) {
          const { reads, writes } = touches(node)
          for (const from of reads) {
            for (const to of writes) assert.ok(!overlap(from, to), `${node.kind}: ${from}, ${to}`)
          }
        }
      }
    })
  }
}
