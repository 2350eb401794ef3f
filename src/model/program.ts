// Owns the language that architectures are written in: a short list of ops over named weights.
// A backend lowers the list once; it never knows which family it came from.

import { assert, present } from '../assert.ts'
import type { Model, ModelConfig, RopeConfig } from './model.ts'

/** An activation: one row of `width` float32 for each token (or each selected token). */
export type Value = number

/** One matrix product of several that read the same input; `bias` is added to every row. */
export interface Projection {
  out: Value
  weight: string
  bias: string | undefined
}

export type Op =
  /** out[t] = scale · weight[token[t]] */
  | { kind: 'embed'; out: Value; weight: string; scale: number }
  /** out = in / rms(in) · weight, over each run of `group` elements (a row, or a head). */
  | { kind: 'norm'; out: Value; in: Value; weight: string; group: number; eps: number }
  /** Each projection's out = weight · in (+ bias). */
  | { kind: 'linear'; in: Value; projections: readonly Projection[] }
  /** Rotates every head of the values in place, by the token's position. */
  | { kind: 'rope'; values: readonly Value[]; rope: RopeConfig }
  /** Writes this step's keys and values to the KV memory of each token's sequence. */
  | { kind: 'kvAppend'; layer: number; k: Value; v: Value }
  /** Causal attention of q over its sequence's KV; `window` bounds how far back it looks. */
  | { kind: 'attention'; out: Value; q: Value; layer: number; window: number | undefined }
  /** out = activation(gate) · up */
  | { kind: 'glu'; out: Value; gate: Value; up: Value; activation: 'silu' | 'gelu' }
  /** out = a + b */
  | { kind: 'add'; out: Value; a: Value; b: Value }
  /** Keeps the rows of tokens whose next-token distribution is wanted. */
  | { kind: 'select'; out: Value; in: Value }
  /** The distribution over the vocabulary, one row for each selected token. */
  | { kind: 'logits'; in: Value; weight: string }

export interface Program {
  config: ModelConfig
  ops: readonly Op[]
  /** Elements a row, by value. */
  widths: readonly number[]
  /** Whether a value has a row for each token or, downstream of `select`, for each output. */
  rows: readonly Rows[]
}

export type Rows = 'tokens' | 'outputs'

/** Writes a program op by op; each method returns the value it made. */
export class ProgramBuilder {
  readonly config: ModelConfig
  private readonly tensors: Model['tensors']
  private readonly ops: Op[] = []
  private readonly widths: number[] = []
  private readonly rows: Rows[] = []

  constructor(model: Pick<Model, 'config' | 'tensors'>) {
    this.config = model.config
    this.tensors = model.tensors
  }

  has(weight: string): boolean {
    return this.tensors.has(weight)
  }

  embed(weight: string): Value {
    const out = this.value(this.config.hidden, 'tokens')
    this.ops.push({ kind: 'embed', out, weight, scale: this.config.embeddingScale })
    return out
  }

  norm(input: Value, weight: string, group = this.width(input)): Value {
    const out = this.like(input)
    this.ops.push({ kind: 'norm', out, in: input, weight, group, eps: this.config.normEps })
    return out
  }

  /** Products of one input with several weights; `NAME.bias` joins in where the model has it. */
  linear<Names extends readonly string[]>(
    input: Value,
    ...names: Names
  ): { [K in keyof Names]: Value } {
    const projections = names.map((name) => {
      const weight = `${name}.weight`
      const tensor = this.tensors.get(weight)
      assert(tensor, `tensor ${weight} was checked when the model was opened`)
      assert(tensor.shape[0] === this.width(input), `${weight} takes rows of its input's width`)
      const bias = this.has(`${name}.bias`) ? `${name}.bias` : undefined
      return { out: this.value(tensor.shape[1] ?? 1, this.rowsOf(input)), weight, bias }
    })
    this.ops.push({ kind: 'linear', in: input, projections })
    return projections.map((projection) => projection.out) as { [K in keyof Names]: Value }
  }

  /**
   * The three projections of an attention block. In the last block only the outputs' queries are
   * ever used: there q is made of selected rows, k and v of all.
   */
  queryKeyValue(input: Value, block: string, isLast: boolean): [q: Value, k: Value, v: Value] {
    const names = [`${block}.attn_q`, `${block}.attn_k`, `${block}.attn_v`] as const
    if (!isLast) return this.linear(input, ...names)
    const [k, v] = this.linear(input, names[1], names[2])
    const [q] = this.linear(this.select(input), names[0])
    return [q, k, v]
  }

  rope(values: readonly Value[], rope: RopeConfig): void {
    this.ops.push({ kind: 'rope', values, rope })
  }

  /** Appends k and v to the layer's KV, then attends with q. */
  attention(layer: number, q: Value, k: Value, v: Value): Value {
    const sliding = this.config.slidingWindow
    const window = sliding?.layers[layer] ? sliding.tokens : undefined
    const out = this.like(q)
    this.ops.push({ kind: 'kvAppend', layer, k, v })
    this.ops.push({ kind: 'attention', out, q, layer, window })
    return out
  }

  glu(gate: Value, up: Value, activation: 'silu' | 'gelu'): Value {
    const out = this.like(gate)
    this.ops.push({ kind: 'glu', out, gate, up, activation })
    return out
  }

  add(a: Value, b: Value): Value {
    const out = this.like(a)
    this.ops.push({ kind: 'add', out, a, b })
    return out
  }

  select(input: Value): Value {
    const out = this.value(this.width(input), 'outputs')
    this.ops.push({ kind: 'select', out, in: input })
    return out
  }

  /** Ends the program. A model without `output.weight` shares its embedding's. */
  logits(input: Value): Program {
    const weight = this.has('output.weight') ? 'output.weight' : 'token_embd.weight'
    this.ops.push({ kind: 'logits', in: input, weight })
    return { config: this.config, ops: this.ops, widths: this.widths, rows: this.rows }
  }

  private value(width: number, rows: Rows): Value {
    this.rows.push(rows)
    return this.widths.push(width) - 1
  }

  /** A new value of the same shape. */
  private like(value: Value): Value {
    return this.value(this.width(value), this.rowsOf(value))
  }

  private rowsOf(value: Value): Rows {
    return present(this.rows[value], 'the rows of a value')
  }

  private width(value: Value): number {
    const width = this.widths[value]
    assert(width !== undefined, `value ${value} exists`)
    return width
  }
}
