// Owns the least time that kernels of a step can take: what they have to read and write at the
// bandwidth of memory, or their operations at the matrix library's rate, whichever is longer.

import { present } from '../assert.ts'
import type { NamedCommand } from '../backends/cuda/lower.ts'
import type { Model } from '../model/model.ts'
import type { Program, Rows, Value } from '../model/program.ts'

/** Measured in the same run. */
export interface Ceilings {
  readGBs: number
  /** TFLOP/s of matrix products of bf16. */
  teraflops: number
}

/** Rows of a step, and what their attention sees, in a model without windows. */
export interface StepRows extends Readonly<Record<Rows, number>> {
  /** Tokens of all sequences, the step's included. */
  seen: number
  /** Summed over the step's tokens, the tokens that each sees. */
  pairs: number
}

export interface Work {
  bytes: number
  operations: number
}

type Node = NamedCommand['nodes'][number]

const BF16 = 2
const FLOAT32 = 4

/** Microseconds. */
export function floorUs({ bytes, operations }: Work, { readGBs, teraflops }: Ceilings): number {
  return Math.max(bytes / readGBs / 1e3, operations / teraflops / 1e6)
}

/** What commands have to read, write and multiply. */
export class StepWork {
  private readonly program: Program
  private readonly tensors: Model['tensors']
  private readonly narrow: ReadonlySet<string>
  private readonly rows: StepRows

  /** @param narrow weights that have one byte an element */
  constructor(
    program: Program,
    tensors: Model['tensors'],
    narrow: ReadonlySet<string>,
    rows: StepRows,
  ) {
    this.program = program
    this.tensors = tensors
    this.narrow = narrow
    this.rows = rows
  }

  /** Of several nodes in one kernel only weights, keys and values: the rest can stay on chip. */
  of(nodes: readonly Node[]): Work {
    const works = nodes.map((node) => ({ ...this.main(node), activations: this.activations(node) }))
    const sum = (of: (work: (typeof works)[number]) => number) =>
      works.reduce((total, work) => total + of(work), 0)
    const alone = nodes.length === 1
    return {
      bytes: sum(({ bytes, activations }) => bytes + (alone ? activations : 0)),
      operations: sum(({ operations }) => operations),
    }
  }

  /** Of weights, keys and values. */
  private main(node: Node): Work {
    const { heads, kvHeads, headDim } = this.program.config
    switch (node.kind) {
      case 'skinny':
        return this.main(node.linear)
      case 'linear':
        return this.product(node.weights, this.rows[node.rows])
      case 'logits':
        return this.product([node.weight], this.rows.outputs)
      case 'attention': {
        const { seen, pairs } = this.rows
        const all = this.rows[node.rows] === this.rows.tokens
        return {
          bytes: 2 * kvHeads * headDim * BF16 * seen,
          // An output that is no other row sees its whole sequence.
          operations: 4 * heads * headDim * (all ? pairs : seen),
        }
      }
      default:
        return { bytes: 0, operations: 0 }
    }
  }

  private product(weights: readonly string[], rows: number): Work {
    const works = weights.map((name) => {
      const [k = 1, m = 1] = present(this.tensors.get(name), name).shape
      const bytes = m * k * (this.narrow.has(name) ? 1 : BF16)
      return { bytes, operations: 2 * m * k * rows }
    })
    return {
      bytes: works.reduce((sum, { bytes }) => sum + bytes, 0),
      operations: works.reduce((sum, { operations }) => sum + operations, 0),
    }
  }

  /** Bytes of rows that a node reads and writes. */
  private activations(node: Node): number {
    const { widths, config } = this.program
    // A value that the program does not have is its rotated queries.
    const widthOf = (value: Value | undefined) =>
      value === undefined ? 0 : (widths[value] ?? config.heads * config.headDim)
    const width = (values: readonly (Value | undefined)[]) =>
      values.reduce<number>((sum, value) => sum + widthOf(value), 0)
    const bytes = (rows: Rows, ...values: readonly (Value | undefined)[]) =>
      this.rows[rows] * width(values) * BF16
    switch (node.kind) {
      case 'embed':
        return 2 * bytes('tokens', node.out)
      case 'linear':
        return bytes(node.rows, node.in, ...node.outs, ...(node.accumulate ? node.outs : []))
      case 'logits':
        return bytes('outputs', node.in) + this.rows.outputs * config.vocab * FLOAT32
      case 'norm':
        return bytes(node.rows, node.x, node.added, node.added && node.x, node.out)
      case 'rope':
        return 2 * bytes(node.rows, node.q?.value, node.k?.value, node.v)
      case 'attention':
        return bytes(node.rows, node.q, node.out)
      case 'glu':
        return bytes(node.rows, node.gate, node.up, node.out)
      case 'select':
        return 2 * bytes('outputs', node.out)
      case 'add':
        return bytes(node.rows, node.a, node.b, node.out)
      case 'skinny': {
        const { linear, glu, in: input } = node
        if (linear.kind === 'logits') return this.activations({ ...linear, in: input })
        // Rotated and appended rows are as wide as the product's.
        const outs = glu ? [glu.out] : linear.outs
        return bytes(linear.rows, input, ...outs, ...(linear.accumulate ? outs : []))
      }
    }
  }
}
