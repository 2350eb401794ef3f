// Owns which weight tensor each op of a program multiplies with: asked for once, shared by all the
// graphs of a backend, so that nothing is loaded twice.

import type { Op, Program } from '../../model/program.ts'
import type { Tensor } from './tensors.ts'
import type { Weights } from './weights.ts'

type Linear = Extract<Op, { kind: 'linear' }>

export class WeightTensors {
  private readonly weights: Weights
  private readonly tables = new Map<string, Tensor>()
  private readonly matrices = new Map<string, Tensor>()
  private readonly vectors = new Map<string, Tensor>()
  private readonly whole = new Map<Op, Tensor>()
  private readonly constants = new Map<Float32Array, Tensor>()

  /** @param normOffset added to norm weights (Gemma's safetensors). */
  constructor(program: Program, weights: Weights, normOffset: number) {
    this.weights = weights
    for (const op of program.ops) {
      if (op.kind === 'embed') this.tables.set(op.weight, weights.table(op.weight))
      if (op.kind === 'logits') this.matrices.set(op.weight, weights.matrix(op.weight))
      if (op.kind === 'norm') this.vectors.set(op.weight, weights.vector([op.weight], normOffset))
      if (op.kind === 'linear') this.linear(op)
      if (op.kind === 'rope' && op.rope.scaling.kind === 'factors') {
        this.constant(op.rope.scaling.divisors)
      }
    }
    weights.load()
  }

  table(name: string): Tensor {
    return found(this.tables.get(name), name)
  }

  matrix(name: string): Tensor {
    return found(this.matrices.get(name), name)
  }

  /** A vector that scales or shifts rows: a norm's weight, a projection's bias. */
  norm(name: string): Tensor {
    return found(this.vectors.get(name), name)
  }

  /** Whether a product with one of these must have two rows at least (`Weights` says why). */
  inPairs(names: readonly string[]): boolean {
    return names.some((name) => this.weights.multipliesInPairs(name))
  }

  /** All projections of a linear op as one matrix, if they could be joined. */
  joined(op: Op): Tensor | undefined {
    return this.whole.get(op)
  }

  divisors(values: Float32Array): Tensor {
    return found(this.constants.get(values), 'rope divisors')
  }

  private linear(op: Linear): void {
    const names = op.projections.map((projection) => projection.weight)
    const whole = names.length > 1 ? this.weights.joined(names) : undefined
    if (whole !== undefined) this.whole.set(op, whole)
    else for (const name of names) this.matrices.set(name, this.weights.matrix(name))
    for (const { bias } of op.projections) {
      if (bias !== undefined) this.vectors.set(bias, this.weights.vector([bias]))
    }
  }

  private constant(values: Float32Array): void {
    if (!this.constants.has(values)) this.constants.set(values, this.weights.constant(values))
  }
}

function found(tensor: Tensor | undefined, name: string): Tensor {
  if (tensor === undefined) throw new Error(`invariant broken: ${name} was prepared`)
  return tensor
}
