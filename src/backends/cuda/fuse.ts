// Owns the grouping of a program's ops into what the GPU runs in one go: sums with norms, the
// projections of a block into one matrix, rotation with the append, and, for a few tokens, whatever
// rides along with a product. Pure: it knows no device.

import { assert, present } from '../../assert.ts'
import type { RopeConfig } from '../../model/model.ts'
import type { Op, Program, Rows, Value } from '../../model/program.ts'

type Linear = Extract<Op, { kind: 'linear' }>

/** Of a norm over whole rows, or over heads. */
export interface Norm {
  weight: string
  eps: number
}

/** A head's way from projection to attention. */
export interface HeadSource {
  value: Value
  norm: Norm | undefined
}

export interface LinearNode {
  kind: 'linear'
  in: Value
  weights: readonly string[]
  /** Beside each other in one row. */
  outs: readonly Value[]
  biases: readonly (string | undefined)[]
  /** Whether the product is added to what `outs` (a single one) holds. */
  accumulate: boolean
  rows: Rows
}

export interface NormNode {
  kind: 'norm'
  /** The row; with `added`, the sum is written to it. */
  x: Value
  added: Value | undefined
  /** A norm over `added` before the sum. */
  post: Norm | undefined
  norm: Norm | undefined
  out: Value | undefined
  rows: Rows
}

export interface RopeNode {
  kind: 'rope'
  /** q is turned into `qOut`, k and v go to the KV memory; either may be missing. */
  q: HeadSource | undefined
  qOut: Value | undefined
  k: HeadSource | undefined
  v: Value | undefined
  rope: RopeConfig
  layer: number
  rows: Rows
}

export interface GluNode {
  kind: 'glu'
  gate: Value
  up: Value
  out: Value
  activation: 'silu' | 'gelu'
  rows: Rows
}

export interface LogitsNode {
  kind: 'logits'
  in: Value
  weight: string
}

export type Node =
  | { kind: 'embed'; out: Value; weight: string; scale: number }
  | LinearNode
  | NormNode
  | RopeNode
  | GluNode
  | LogitsNode
  | { kind: 'attention'; out: Value; q: Value; layer: number; window?: number; rows: Rows }
  | { kind: 'select'; in: Value; out: Value }
  | { kind: 'add'; a: Value; b: Value; out: Value; rows: Rows }

/** Products of a few tokens take what surrounds them along. */
export interface SkinnyNode {
  kind: 'skinny'
  linear: LinearNode | LogitsNode
  /** The product's input, before `norm` if there is one. */
  in: Value
  norm: Norm | undefined
  rope: RopeNode | undefined
  glu: GluNode | undefined
}

/**
 * A program's nodes.
 * @param everyRow every token is an output, as when all sequences decode: nothing is selected
 */
export function fuse(program: Program, everyRow: boolean): Node[] {
  return new Fuser(program, everyRow).nodes
}

class Fuser {
  readonly nodes: Node[] = []
  private readonly program: Program
  private readonly everyRow: boolean
  /** What a value is another name of. */
  private readonly names = new Map<Value, Value>()
  private readonly uses = new Map<Value, number>()
  private readonly heads = new Map<Value, HeadSource>()
  private readonly ropes = new Map<Value, RopeConfig>()
  /** Values that are rotated. */
  private readonly rotates: ReadonlySet<Value>
  /** Post-norms that wait for their sum. */
  private readonly posts = new Map<Value, { in: Value; norm: Norm }>()
  /** Where a value is a rotated q: what attention reads. */
  private rotated: Value

  constructor(program: Program, everyRow: boolean) {
    this.program = program
    this.everyRow = everyRow
    this.rotated = program.widths.length
    this.rotates = new Set(program.ops.flatMap((op) => (op.kind === 'rope' ? op.values : [])))
    for (const op of program.ops) {
      for (const value of reads(op)) this.uses.set(value, (this.uses.get(value) ?? 0) + 1)
    }
    for (const op of program.ops) this.take(op)
  }

  private take(op: Op): void {
    switch (op.kind) {
      case 'embed':
        this.nodes.push(op)
        return
      case 'linear':
        return this.linear(op)
      case 'norm':
        return this.norm(op)
      case 'rope':
        for (const value of op.values) this.ropes.set(value, op.rope)
        return
      case 'kvAppend':
        return this.append(op)
      case 'attention':
        return this.attention(op)
      case 'glu': {
        const { gate, up, out, activation } = op
        this.nodes.push({ kind: 'glu', gate, up, out, activation, rows: this.rowsOf(gate) })
        return
      }
      case 'add':
        return this.add(op)
      case 'select':
        if (this.everyRow) this.names.set(op.out, this.name(op.in))
        else this.nodes.push({ kind: 'select', in: this.name(op.in), out: op.out })
        return
      case 'logits':
        this.nodes.push({ kind: 'logits', in: this.name(op.in), weight: op.weight })
    }
  }

  private linear(op: Linear): void {
    const input = this.name(op.in)
    const last = this.nodes.at(-1)
    // The last block asks for q apart: with no selection between, all three are one matrix again.
    const beside = last?.kind === 'linear' && last.in === input ? last : undefined
    const parts = {
      weights: op.projections.map(({ weight }) => weight),
      outs: op.projections.map(({ out }) => out),
      biases: op.projections.map(({ bias }) => bias),
    }
    if (beside) {
      beside.weights = [...parts.weights, ...beside.weights]
      beside.outs = [...parts.outs, ...beside.outs]
      beside.biases = [...parts.biases, ...beside.biases]
      return
    }
    const rows = this.rowsOf(op.in)
    this.nodes.push({ kind: 'linear', in: input, ...parts, accumulate: false, rows })
  }

  private norm(op: Extract<Op, { kind: 'norm' }>): void {
    const norm = { weight: op.weight, eps: op.eps }
    // A value of one head has rows of one group: what is rotated next is a head's norm.
    if (this.rotates.has(op.out)) {
      this.heads.set(op.out, { value: this.name(op.in), norm })
      return
    }
    const next = this.program.ops[this.program.ops.indexOf(op) + 1]
    if (next?.kind === 'add' && next.b === op.out) {
      this.posts.set(op.out, { in: this.name(op.in), norm })
      return
    }
    const x = this.name(op.in)
    const last = this.nodes.at(-1)
    if (last?.kind === 'norm' && last.x === x && last.out === undefined) {
      last.norm = norm
      last.out = op.out
      return
    }
    const rows = this.rowsOf(op.in)
    this.nodes.push({ kind: 'norm', x, added: undefined, post: undefined, norm, out: op.out, rows })
  }

  private append(op: Extract<Op, { kind: 'kvAppend' }>): void {
    const q = this.program.ops[this.program.ops.indexOf(op) + 1]
    assert(q?.kind === 'attention' && q.layer === op.layer, 'attention follows its append')
    const rope = present(this.ropes.get(op.k), 'the rotation of k')
    assert(this.ropes.get(q.q) === rope, 'q and k are rotated alike')
    const k = { k: this.head(op.k), v: this.name(op.v) }
    const query = { q: this.head(q.q), qOut: this.rotatedOf(q.q) }
    const { layer } = op
    const rows = this.rowsOf(op.k)
    if (rows === this.rowsOf(q.q)) {
      this.nodes.push({ kind: 'rope', ...query, ...k, rope, layer, rows })
      return
    }
    const none = { k: undefined, v: undefined }
    this.nodes.push({ kind: 'rope', q: undefined, qOut: undefined, ...k, rope, layer, rows })
    this.nodes.push({ kind: 'rope', ...query, ...none, rope, layer, rows: this.rowsOf(q.q) })
  }

  private attention(op: Extract<Op, { kind: 'attention' }>): void {
    this.nodes.push({
      kind: 'attention',
      out: op.out,
      q: this.name(this.rotatedOf(op.q)),
      layer: op.layer,
      ...(op.window === undefined ? {} : { window: op.window }),
      rows: this.rowsOf(op.q),
    })
  }

  private add(op: Extract<Op, { kind: 'add' }>): void {
    const [a, b] = [this.name(op.a), this.name(op.b)]
    const rows = this.rowsOf(op.a)
    const last = this.nodes.at(-1)
    // The sum takes the place of its first operand, which nobody reads again.
    const free = this.uses.get(op.a) === 1 || this.onlyNormed(op.a)
    const post = this.posts.get(op.b)
    if (free && post) {
      const added = post.in
      const none = { norm: undefined, out: undefined }
      this.nodes.push({ kind: 'norm', x: a, added, post: post.norm, ...none, rows })
      this.names.set(op.out, a)
      return
    }
    assert(!post, 'a norm before a sum has a residual stream to go to')
    if (free && last?.kind === 'linear' && last.outs.length === 1 && last.outs[0] === b) {
      last.outs = [a]
      last.accumulate = true
      this.names.set(op.out, a)
      return
    }
    this.nodes.push({ kind: 'add', a, b, out: op.out, rows })
  }

  /** Whether a value is read by its block's norm (before the sum) and by the sum alone. */
  private onlyNormed(value: Value): boolean {
    const readers = this.program.ops.filter((op) => reads(op).includes(value))
    const last = readers.at(-1)
    return last?.kind === 'add' && last.a === value
  }

  private head(value: Value): HeadSource {
    return this.heads.get(value) ?? { value: this.name(value), norm: undefined }
  }

  private readonly rotatedValues = new Map<Value, Value>()

  /** A value of its own for a rotated q, beyond the program's values. */
  private rotatedOf(q: Value): Value {
    let value = this.rotatedValues.get(q)
    if (value === undefined) this.rotatedValues.set(q, (value = this.rotated++))
    return value
  }

  private name(value: Value): Value {
    return this.names.get(value) ?? value
  }

  private rowsOf(value: Value): Rows {
    return this.everyRow ? 'tokens' : present(this.program.rows[value], 'the rows of a value')
  }
}

function reads(op: Op): readonly Value[] {
  switch (op.kind) {
    case 'embed':
      return []
    case 'rope':
      return op.values
    case 'kvAppend':
      return [op.k, op.v]
    case 'attention':
      return [op.q]
    case 'glu':
      return [op.gate, op.up]
    case 'add':
      return [op.a, op.b]
    default:
      return [op.in]
  }
}

/**
 * Nodes for a few tokens: norms, rotations and activations ride along with their product.
 * @param norms whether norms before a product do, too
 */
export function fuseSkinny(nodes: readonly Node[], norms = true): (Node | SkinnyNode)[] {
  const fused: (Node | SkinnyNode)[] = []
  for (let i = 0; i < nodes.length; i++) {
    const node = present(nodes[i], 'a node')
    if (node.kind !== 'linear' && node.kind !== 'logits') {
      fused.push(node)
      continue
    }
    const before = fused.at(-1)
    const norm =
      norms &&
      before?.kind === 'norm' &&
      !before.added &&
      before.out === node.in &&
      single(nodes, node.in)
        ? before
        : undefined
    if (norm) fused.pop()
    const after = nodes[i + 1]
    const rope = after?.kind === 'rope' && takesRope(node, after) ? after : undefined
    const glu = after?.kind === 'glu' && node.kind === 'linear' ? after : undefined
    if (rope || glu) i++
    const input = norm ? norm.x : node.in
    fused.push({ kind: 'skinny', linear: node, in: input, norm: norm?.norm, rope, glu })
  }
  return fused
}

/** Whether only one node reads a value. */
export function single(nodes: readonly Node[], value: Value): boolean {
  return nodes.filter((node) => readsOf(node).includes(value)).length === 1
}

function takesRope(node: LinearNode | LogitsNode, { q, k, v }: RopeNode): boolean {
  if (node.kind === 'logits' || !q || !k || v === undefined || q.norm || k.norm) return false
  return node.outs.join() === [q.value, k.value, v].join()
}

export function readsOf(node: Node): readonly Value[] {
  switch (node.kind) {
    case 'embed':
      return []
    case 'linear':
      return node.accumulate ? [node.in, ...node.outs] : [node.in]
    case 'norm':
      return node.added === undefined ? [node.x] : [node.x, node.added]
    case 'rope':
      return [node.q?.value, node.k?.value, node.v].filter((value) => value !== undefined)
    case 'attention':
      return [node.q]
    case 'glu':
      return [node.gate, node.up]
    case 'add':
      return [node.a, node.b]
    default:
      return [node.in]
  }
}

/** What a node makes, groups side by side in one row; what it changes in place is not made. */
export function makes(node: Node): readonly Value[] {
  switch (node.kind) {
    case 'linear':
      return node.accumulate ? [] : node.outs
    case 'norm':
      return node.out === undefined ? [] : [node.out]
    case 'rope':
      return node.qOut === undefined ? [] : [node.qOut]
    case 'logits':
      return []
    default:
      return [node.out]
  }
}
