// Owns a program lowered to a ggml graph. It is built once for the largest step; each step then
// writes its token count, output count and attention pieces into the tensors and runs it again.

import { assert, present } from '../../assert.ts'
import { ROPE_HALVES, ROPE_INTERLEAVED } from '../../ffi/ggml.ts'
import type { RopeConfig } from '../../model/model.ts'
import type { Op, Program, Rows, Value } from '../../model/program.ts'
import type { Activations } from './activations.ts'
import type { AttentionKind, AttentionPlan, AttentionPlans } from './attention.ts'
import type { HostKvMemory } from './kv-memory.ts'
import type { StepMemory } from './step-memory.ts'
import { type Tensor, TensorArena, TYPE_F16, TYPE_F32, TYPE_I32, TYPE_I64 } from './tensors.ts'
import type { WeightTensors } from './weight-tensors.ts'

export interface GraphLimits {
  tokens: number
  outputs: number
  /** Attention pieces that a step may have. */
  pieces: number
}

interface AttentionNode {
  q: Tensor
  k: Tensor
  v: Tensor
  mask: Tensor
  out: Tensor
}

interface AttentionSite {
  layer: number
  kind: AttentionKind
  q: { address: number; rowBytes: number }
  out: { address: number; rowBytes: number }
  nodes: AttentionNode[]
}

const F32 = 4
const F16 = 2

export class StepGraph {
  readonly graph: number
  readonly limits: GraphLimits
  private readonly arena: TensorArena
  private readonly program: Program
  private readonly weights: WeightTensors
  private readonly activations: Activations
  private readonly memory: StepMemory
  private readonly kv: HostKvMemory
  /** Tensors whose size along a dimension is the step's token (or output) count. */
  private readonly perToken: { tensor: Tensor; d: number }[] = []
  private readonly perOutput: { tensor: Tensor; d: number }[] = []
  /** The same, but never less than two: of products that else would be computed otherwise. */
  private readonly pairs: Record<Rows, Tensor[]> = { tokens: [], outputs: [] }
  /** Nodes that only matter when a step wants logits. */
  private readonly tail: Tensor[] = []
  private readonly sites: AttentionSite[] = []
  /** Whether the op that is being lowered has a row for each token or for each output. */
  private rows: Rows = 'tokens'
  /** Whether the product that is being lowered has two rows at least. */
  private inPairs = false
  private tokens: number
  private outputs: number
  private pieces: number

  constructor(
    program: Program,
    weights: WeightTensors,
    activations: Activations,
    memory: StepMemory,
    kv: HostKvMemory,
    limits: GraphLimits,
  ) {
    this.program = program
    this.weights = weights
    this.activations = activations
    this.memory = memory
    this.kv = kv
    this.limits = limits
    const attentions = program.ops.filter((op) => op.kind === 'attention').length
    const nodes = program.ops.length * 4 + attentions * limits.pieces * 6 + 64
    const arenaBytes = nodes * 1024 + (1 << 16)
    this.arena = new TensorArena(arenaBytes)
    const { g, context } = this.arena
    this.graph = g.ggml_new_graph_custom(context, nodes, false)
    for (const op of program.ops) this.lower(op)
    this.tokens = limits.tokens
    this.outputs = limits.outputs
    this.pieces = limits.pieces
  }

  /** Sets the graph up for one step. */
  bind(tokens: number, outputs: number, plans: AttentionPlans): void {
    if (tokens !== this.tokens) {
      for (const { tensor, d } of this.perToken) this.arena.setSize(tensor, d, tokens)
      this.setPairs('tokens', tokens)
      this.tokens = tokens
    }
    if (outputs !== this.outputs) {
      const rows = Math.max(1, outputs)
      for (const { tensor, d } of this.perOutput) this.arena.setSize(tensor, d, rows)
      this.setPairs('outputs', rows)
      for (const node of this.tail) this.arena.setEnabled(node, outputs > 0)
      this.outputs = outputs
    }
    const pieces = plans.pieces()
    assert(pieces <= this.limits.pieces, 'the graph has a node for each attention piece')
    for (const site of this.sites) this.bindAttention(site, plans[site.kind])
    this.pieces = pieces
  }

  private setPairs(rows: Rows, count: number): void {
    const size = Math.min(this.limits[rows], Math.max(2, count))
    for (const tensor of this.pairs[rows]) this.arena.setSize(tensor, 1, size)
  }

  free(): void {
    this.arena.free()
  }

  private lower(op: Op): void {
    const { g, context } = this.arena
    this.rows = this.rowsOf(op)
    switch (op.kind) {
      case 'embed': {
        const ids = this.input(TYPE_I32, this.memory.tokens)
        const rows = g.ggml_get_rows(context, this.weights.table(op.weight), ids)
        this.node(rows, op.out, 1)
        if (op.scale !== 1) this.node(g.ggml_scale(context, rows, op.scale), op.out, 1)
        return
      }
      case 'norm': {
        const x = this.grouped(op.in, op.group)
        const normed = g.ggml_rms_norm(context, x, op.eps)
        this.node(normed, op.out, 2)
        // ggml computes this pair in one pass.
        const scaled = g.ggml_mul(context, normed, this.weights.norm(op.weight))
        this.node(scaled, op.out, 2)
        return
      }
      case 'linear':
        return this.lowerLinear(op)
      case 'rope':
        return this.lowerRope(op.values, op.rope)
      case 'kvAppend':
        return this.lowerAppend(op.layer, op.k, op.v)
      case 'attention':
        return this.lowerAttention(op)
      case 'glu': {
        const whole = this.beside([op.gate, op.up])
        const gate = op.activation === 'silu' ? g.ggml_swiglu : g.ggml_geglu
        const split = op.activation === 'silu' ? g.ggml_swiglu_split : g.ggml_geglu_split
        const node = whole
          ? gate(context, whole)
          : split(context, this.row(op.gate), this.row(op.up))
        this.node(node, op.out, 1)
        return
      }
      case 'add': {
        const sum = g.ggml_add(context, this.row(op.a), this.row(op.b))
        this.node(sum, op.out, 1)
        return
      }
      case 'select': {
        this.rows = 'tokens'
        const x = this.row(op.in)
        this.rows = 'outputs'
        const ids = this.input(TYPE_I32, this.memory.outputs)
        this.node(g.ggml_get_rows(context, x, ids), op.out, 1)
        return
      }
      case 'logits': {
        this.inPairs = this.weights.inPairs([op.weight])
        const product = g.ggml_mul_mat(context, this.weights.matrix(op.weight), this.row(op.in))
        this.append(product, this.memory.logits, 1)
        this.inPairs = false
      }
    }
  }

  private lowerLinear(op: Extract<Op, { kind: 'linear' }>): void {
    const { g, context } = this.arena
    this.inPairs = this.weights.inPairs(op.projections.map(({ weight }) => weight))
    const x = this.row(op.in)
    const whole = this.weights.joined(op)
    const outs = op.projections.map((projection) => projection.out)
    if (whole !== undefined) {
      const first = present(outs[0], 'a projection')
      this.node(g.ggml_mul_mat(context, whole, x), first, 1)
    } else {
      for (const { weight, out } of op.projections) {
        this.node(g.ggml_mul_mat(context, this.weights.matrix(weight), x), out, 1)
      }
    }
    this.inPairs = false
    for (const { bias, out } of op.projections) {
      if (bias === undefined) continue
      const sum = g.ggml_add(context, this.grouped(out, this.width(out)), this.weights.norm(bias))
      this.arena.setStride(sum, 1, this.activations.place(out).rowBytes)
      this.arena.setStride(sum, 2, this.activations.place(out).rowBytes)
      this.node(sum, out, 2)
    }
  }

  private lowerRope(values: readonly Value[], rope: RopeConfig): void {
    const { headDim } = this.program.config
    const whole = values.length > 1 && this.areBeside(values)
    const runs = whole ? [values] : values.map((value) => [value])
    for (const run of runs) {
      const first = present(run[0], 'a value')
      const width = run.reduce((sum, value) => sum + this.width(value), 0)
      this.rows = this.rowsOfValue(first)
      const x = this.grouped(first, headDim, width)
      this.append(this.ropeNode(x, rope), this.address(first), 2)
    }
  }

  private ropeNode(x: Tensor, rope: RopeConfig): Tensor {
    const { g, context } = this.arena
    const { scaling } = rope
    const positions = this.input(TYPE_I32, this.memory.positions[this.rows])
    const factors = scaling.kind === 'factors' ? this.weights.divisors(scaling.divisors) : 0
    const mode = rope.pairing === 'halves' ? ROPE_HALVES : ROPE_INTERLEAVED
    const yarn = scaling.kind === 'yarn' ? scaling : undefined
    const scale = scaling.kind === 'linear' || yarn ? 1 / (scaling as { factor: number }).factor : 1
    // ggml multiplies yarn's own magnitude (1 + 0.1 ln s) in: only what differs from it is passed.
    const magnitude = yarn ? yarn.attentionFactor / (1 + 0.1 * Math.log(yarn.factor)) : 1
    return g.ggml_rope_ext_inplace(
      context,
      x,
      positions,
      factors,
      rope.dimensions,
      mode,
      yarn?.originalContext ?? 0,
      rope.base,
      scale,
      yarn ? 1 : 0,
      magnitude,
      yarn?.betaFast ?? 0,
      yarn?.betaSlow ?? 0,
    )
  }

  private lowerAppend(layer: number, k: Value, v: Value): void {
    const { g, context } = this.arena
    const { layout, slots, address } = this.kv
    const rows = (layout.slotBytes / layout.tokenStride) * slots
    const whole = this.areBeside([k, v])
    let column = address + layer * layout.layerStride
    for (const run of whole ? [[k, v]] : [[k], [v]]) {
      const first = present(run[0], 'a value')
      const width = run.reduce((sum, value) => sum + this.width(value), 0)
      const source = this.leaf(TYPE_F32, [width, this.limits.tokens], this.address(first))
      this.arena.setStride(source, 1, this.activations.place(first).rowBytes)
      this.track(source, 1)
      const target = this.leaf(TYPE_F16, [width, rows], column)
      for (let d = 1; d < 4; d++) this.arena.setStride(target, d, layout.tokenStride)
      const ids = this.input(TYPE_I64, this.memory.kvRows)
      const node = g.ggml_set_rows(context, target, source, ids)
      g.ggml_build_forward_expand(this.graph, node)
      column += width * F16
    }
  }

  private lowerAttention(op: Extract<Op, { kind: 'attention' }>): void {
    const { g, context } = this.arena
    const { headDim, heads, kvHeads, attentionScale } = this.program.config
    const nodes: AttentionNode[] = []
    for (let i = 0; i < this.limits.pieces; i++) {
      const q = this.leaf(TYPE_F32, [headDim, 1, heads, 1], 0)
      const k = this.leaf(TYPE_F16, [headDim, 1, kvHeads, 1], 0)
      const v = this.leaf(TYPE_F16, [headDim, 1, kvHeads, 1], 0)
      const mask = this.leaf(TYPE_F16, [1, 1, 1, 1], 0)
      const out = g.ggml_flash_attn_ext(context, q, k, v, mask, attentionScale, 0, 0)
      g.ggml_build_forward_expand(this.graph, out)
      nodes.push({ q, k, v, mask, out })
    }
    this.sites.push({
      layer: op.layer,
      kind: attentionKind(op, this.program),
      q: { address: this.address(op.q), rowBytes: this.activations.place(op.q).rowBytes },
      out: { address: this.address(op.out), rowBytes: this.activations.place(op.out).rowBytes },
      nodes,
    })
  }

  private bindAttention(site: AttentionSite, plan: AttentionPlan): void {
    const { arena, kv } = this
    const { headDim, heads, kvHeads } = this.program.config
    const { layout } = kv
    const head = headDim * F32
    const masks = this.memory.masks[site.kind]
    for (let i = 0; i < Math.max(plan.count, this.pieces); i++) {
      const { q, k, v, mask, out } = present(site.nodes[i], 'a node for each piece')
      arena.setEnabled(out, i < plan.count)
      if (i >= plan.count) continue
      const piece = present(plan.pieces[i], 'a planned piece')
      const { queries, sequences, kvTokens } = piece
      arena.setData(q, site.q.address + piece.firstToken * site.q.rowBytes)
      arena.setShape(
        q,
        [headDim, queries, heads, sequences],
        [F32, site.q.rowBytes, head, site.q.rowBytes],
      )
      const keys =
        kv.address +
        piece.slot * layout.slotBytes +
        site.layer * layout.layerStride +
        piece.kvStart * layout.tokenStride
      const sizes = [headDim, kvTokens, kvHeads, sequences]
      const strides = [F16, layout.tokenStride, headDim * F16, piece.slotStep * layout.slotBytes]
      arena.setData(k, keys)
      arena.setData(v, keys + kvHeads * headDim * F16)
      arena.setShape(k, sizes, strides)
      arena.setShape(v, sizes, strides)
      arena.setSource(out, 3, piece.mask < 0 ? 0 : mask)
      if (piece.mask >= 0) {
        const row = kvTokens * F16
        arena.setData(mask, masks + piece.mask * F16)
        arena.setShape(mask, [kvTokens, queries, 1, sequences], [F16, row, row * queries])
      }
      arena.setData(out, site.out.address + piece.firstToken * site.out.rowBytes)
      const row = head * heads
      arena.setShape(out, [headDim, heads, queries, sequences], [F32, head, row, row * queries])
    }
  }

  private width(value: Value): number {
    return present(this.program.widths[value], 'the width of a value')
  }

  private address(value: Value): number {
    return this.memory.activations + this.activations.place(value).offset
  }

  /** Whether the values lie side by side in one row, in this order. */
  private areBeside(values: readonly Value[]): boolean {
    for (let i = 1; i < values.length; i++) {
      const [left, right] = [present(values[i - 1], 'value'), present(values[i], 'value')]
      const [a, b] = [this.activations.place(left), this.activations.place(right)]
      if (a.rowBytes !== b.rowBytes || a.offset + this.width(left) * F32 !== b.offset) return false
    }
    return true
  }

  /** Adjacent values as one contiguous matrix, if they fill their rows. */
  private beside(values: readonly Value[]): Tensor | undefined {
    const width = values.reduce((sum, value) => sum + this.width(value), 0)
    const first = present(values[0], 'a value')
    if (!this.areBeside(values)) return undefined
    if (this.activations.place(first).rowBytes !== width * F32) return undefined
    return this.track(this.leaf(TYPE_F32, [width, this.rowCount()], this.address(first)), 1)
  }

  /** A value as a matrix [width, tokens]. */
  private row(value: Value): Tensor {
    const tensor = this.leaf(TYPE_F32, [this.width(value), this.rowCount()], this.address(value))
    for (let d = 1; d < 4; d++) {
      this.arena.setStride(tensor, d, this.activations.place(value).rowBytes)
    }
    return this.track(tensor, 1)
  }

  /** A value (or `width` elements from it on) as [group, width / group, tokens]. */
  private grouped(value: Value, group: number, width = this.width(value)): Tensor {
    const address = this.address(value)
    const tensor = this.leaf(TYPE_F32, [group, width / group, this.rowCount()], address)
    const { rowBytes } = this.activations.place(value)
    this.arena.setStride(tensor, 2, rowBytes)
    this.arena.setStride(tensor, 3, rowBytes)
    return this.track(tensor, 2)
  }

  private input(type: number, address: number): Tensor {
    return this.track(this.leaf(type, [this.rowCount()], address), 0)
  }

  private leaf(type: number, ne: readonly number[], address: number): Tensor {
    const tensor = this.arena.create(type, ne)
    this.arena.setData(tensor, address)
    return tensor
  }

  /** The rows of what an op makes. Ropes have several values and look at each. */
  private rowsOf(op: Op): Rows {
    switch (op.kind) {
      case 'linear':
        return this.rowsOfValue(op.in)
      case 'logits':
        return 'outputs'
      case 'rope':
      case 'kvAppend':
        return 'tokens'
      default:
        return this.rowsOfValue(op.out)
    }
  }

  private rowsOfValue(value: Value): Rows {
    return present(this.program.rows[value], 'the rows of a value')
  }

  private rowCount(): number {
    return this.limits[this.rows]
  }

  private track(tensor: Tensor, d: number): Tensor {
    if (this.inPairs) this.pairs[this.rows].push(tensor)
    else (this.rows === 'outputs' ? this.perOutput : this.perToken).push({ tensor, d })
    return tensor
  }

  private node(tensor: Tensor, out: Value, d: number): void {
    this.append(tensor, this.address(out), d)
  }

  private append(tensor: Tensor, address: number, d: number): void {
    this.arena.setData(tensor, address)
    this.track(tensor, d)
    if (this.rows === 'outputs') this.tail.push(tensor)
    this.arena.g.ggml_build_forward_expand(this.graph, tensor)
  }
}

/** Which plan an attention op follows. */
function attentionKind(op: Extract<Op, { kind: 'attention' }>, program: Program): AttentionKind {
  if (program.rows[op.q] === 'outputs') return 'outputs'
  return op.window === undefined ? 'global' : 'window'
}
