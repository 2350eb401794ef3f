// Owns the lowering of fused nodes to launches: each node becomes a function that queues its
// kernels for a step of any number of rows. Nothing here waits or allocates when a step runs.

import { assert, present } from '../../assert.ts'
import { LatticeError } from '../../errors.ts'
import { type ArgumentKind, KernelLaunch } from '../../ffi/kernel-launch.ts'
import type { Program, Rows, Value } from '../../model/program.ts'
import { BatchSteps } from './batch-steps.ts'
import { Buffers } from './buffers.ts'
import { E4m3Products, type Surroundings } from './e4m3-products.ts'
import {
  type GluNode,
  type LinearNode,
  type LogitsNode,
  type Node,
  type NormNode,
  type RopeNode,
  type SkinnyNode,
  fuseSkinny,
} from './fuse.ts'
import { GEMV_TOKENS_MAX } from './gemv.ts'
import { type FusedProducts, HopperProducts, rowsOf } from './hopper-launch.ts'
import { HOPPER_TOKENS_MAX } from './hopper-products.ts'
import type { LowerContext, StepShape } from './lower-context.ts'
import { type Product, paddedRows } from './matmul.ts'
import { fewOfE4m3, SKINNY_TOKENS, SkinnyProducts } from './skinny.ts'
import { WholeSteps } from './whole-steps.ts'

export type Command = (step: StepShape) => void

/** What a command does: its node's kind, and its matrix without the block's number. */
export interface NamedCommand {
  name: string
  /** More than one where a kernel does them together. */
  nodes: readonly (Node | SkinnyNode)[]
  run: Command
}

interface Operands {
  product: Product
  weight: number
  x: number
  out: number
}

export class Lowering {
  /** Rows that buffers have. */
  private readonly room: Readonly<Record<Rows, number>>
  /** Tokens of the largest step. */
  private readonly rowsMax: number
  readonly buffers: Buffers
  private whole: readonly (NamedCommand[] | undefined)[] = []
  private wholeSteps: WholeSteps | undefined
  batchSteps: BatchSteps | undefined
  private embedding: Command | undefined
  private readonly context: LowerContext
  readonly program: Program
  private readonly nodes: readonly Node[]
  private arena = 0
  private commands: readonly NamedCommand[] = []
  private skinny: readonly NamedCommand[] = []
  /** By number of tokens, whether that is for them. */
  private few: readonly boolean[] = []
  private skinnyNodes: readonly (Node | SkinnyNode)[] = []
  private readonly products: SkinnyProducts
  private hopper: readonly NamedCommand[] = []
  private readonly hopperProducts: HopperProducts
  private readonly e4m3: E4m3Products | undefined

  constructor(
    program: Program,
    nodes: readonly Node[],
    context: LowerContext,
    rowsMax: Readonly<Record<Rows, number>>,
  ) {
    this.program = program
    this.nodes = nodes
    this.context = context
    this.rowsMax = rowsMax.tokens
    this.room = { tokens: paddedRows(rowsMax.tokens), outputs: paddedRows(rowsMax.outputs) }
    this.buffers = new Buffers(nodes, program, this.room)
    const place = (value: Value) => this.place(value)
    this.products = new SkinnyProducts(context, program.config, place)
    this.hopperProducts = new HopperProducts(context, program.config, place, this.room)
    this.e4m3 = context.e4m3 && new E4m3Products(context, context.e4m3, nodes, place)
  }

  /** Lowers everything to an arena of `buffers.bytes` at this address. */
  build(arena: number): void {
    this.arena = arena
    this.whole = this.lowerWhole()
    this.commands = this.nodes.map((node) => ({
      name: nameOf(node),
      nodes: [node],
      run: this.lower(node, this.e4m3),
    }))
    const fused = (nodes: readonly (Node | SkinnyNode)[], products: FusedProducts) =>
      nodes.map((node) => ({
        name: nameOf(node.kind === 'skinny' ? node.linear : node),
        nodes: [node],
        run: this.lowerFused(node, products),
      }))
    this.skinnyNodes = fuseSkinny(this.nodes)
    this.skinny = fused(this.skinnyNodes, this.products)
    this.few = Array.from({ length: 1 + GEMV_TOKENS_MAX }, (_, tokens) => this.fewFit(tokens))
    if (this.e4m3) return
    this.hopper = fused(fuseSkinny(this.nodes, false), this.hopperProducts)
  }

  /** Why steps of so many tokens are more than one kernel; undefined if they are not. */
  whyNotWhole(tokens: number): string | undefined {
    if (tokens > GEMV_TOKENS_MAX) return this.batchSteps?.whyNot(tokens)
    return this.e4m3 ? 'its weights are fp8' : this.wholeSteps?.reasons[tokens]
  }

  close(): void {
    this.wholeSteps?.close()
    this.batchSteps?.close()
  }

  /** Loads what launches would load when they are first needed. */
  prepare(): void {
    if (!this.context.skinny) return
    for (const tokens of SKINNY_TOKENS) {
      if (!this.few[tokens]) continue
      for (const node of this.skinnyNodes) {
        if (node.kind === 'skinny') this.products.launch(node, tokens)
      }
    }
  }

  /** What `queue` runs for so many tokens, one by one; for measurements. */
  commandsFor(tokens: number): readonly NamedCommand[] {
    const { skinny, hopper } = this.context
    const whole = this.whole[tokens] ?? this.batch(tokens)
    if (whole) return whole
    if (this.e4m3) return skinny && this.few[tokens] ? this.skinny : this.commands
    if (tokens <= GEMV_TOKENS_MAX) return skinny ? this.skinny : this.commands
    return hopper === 'never' || tokens > HOPPER_TOKENS_MAX ? this.commands : this.hopper
  }

  /** Queues the program, embedding to logits. */
  queue(step: StepShape): void {
    for (const { run } of this.commandsFor(step.tokens)) run(step)
  }

  /** The embedding, its norm, and one kernel for all the rest. */
  private batch(tokens: number): NamedCommand[] | undefined {
    const [first, second, ...nodes] = this.nodes
    const { batchSteps } = this
    if (!batchSteps?.launch(tokens) || first?.kind !== 'embed' || !second) return undefined
    const { driver } = this.context
    const launch = (part: 'norm' | 'step') => (step: StepShape) =>
      driver.launch(present(batchSteps.launch(step.tokens), 'a launch')[part], step.stream)
    return [
      { name: nameOf(first), nodes: [first], run: (this.embedding ??= this.lower(first)) },
      { name: 'norm', nodes: [second], run: launch('norm') },
      { name: 'step', nodes, run: launch('step') },
    ]
  }

  /** By number of tokens: the embedding, and one kernel for all the rest. */
  private lowerWhole(): (NamedCommand[] | undefined)[] {
    const { driver, skinny } = this.context
    const [first, ...rest] = this.nodes
    if (!skinny || first?.kind !== 'embed') return []
    const { context, nodes } = this
    const { config } = this.program
    const place = (value: Value) => this.place(value)
    this.batchSteps = new BatchSteps(context, config, nodes, place)
    this.batchSteps.prepare(this.rowsMax)
    if (this.e4m3) return []
    const embed = { name: nameOf(first), nodes: [first], run: this.lower(first) }
    const steps = new WholeSteps(context, config, nodes, place)
    this.wholeSteps = steps
    return Array.from({ length: 1 + GEMV_TOKENS_MAX }, (_, tokens) => {
      const launch = tokens <= this.rowsMax ? steps.launch(tokens) : undefined
      const run = ({ stream }: StepShape) => launch && driver.launch(launch, stream)
      return launch && [embed, { name: 'step', nodes: rest, run }]
    })
  }

  /** The products of all nodes, each with the weights that are multiplied so. */
  productShapes(): { product: Product; weights: number[] }[] {
    const shapes = new Map<string, { product: Product; weights: number[] }>()
    for (const node of this.nodes) {
      if (node.kind !== 'linear' && node.kind !== 'logits') continue
      const { product, weight } = this.productOf(node)
      const key = JSON.stringify(product)
      const shape = shapes.get(key) ?? { product, weights: [] }
      shape.weights.push(weight)
      shapes.set(key, shape)
    }
    return [...shapes.values()]
  }

  /** Measures which kernels are fastest for products of so many tokens. */
  tuneHopper(tokens: readonly number[], microseconds: (queue: () => void) => number): void {
    const { stream } = this.context.state
    const nodes = fuseSkinny(this.nodes, false).filter((node) => node.kind === 'skinny')
    const apart = new Map(nodes.map((node) => [node, this.partsOf(node)]))
    for (const count of tokens) {
      const step = { stream, tokens: count, outputs: count, singles: count, segments: 0 }
      this.hopperProducts.tune(nodes, count, stream, microseconds, (node) =>
        present(apart.get(node), 'parts').forEach((command) => command(step)),
      )
    }
  }

  /** Whether steps of so few tokens are as `skinny` has them. */
  private fewFit(tokens: number): boolean {
    if (!this.e4m3) return true
    return fewOfE4m3(this.skinnyNodes, tokens, (names) => {
      const { k, scales } = this.context.weights.joined(names)
      return { k, e4m3: scales !== 0 }
    })
  }

  /** @param e4m3 whose neighbours norms, rotations and activations are, if they are */
  private lower(node: Node, e4m3?: E4m3Products): Command {
    switch (node.kind) {
      case 'embed':
        return this.embed(node)
      case 'linear':
      case 'logits':
        return this.matmul(node)
      case 'norm':
        return e4m3?.norm(node) ?? this.norm(node)
      case 'rope':
        return this.rope(node, e4m3?.around(node))
      case 'attention':
        return this.attention(node)
      case 'glu':
        return e4m3?.glu(node) ?? this.glu(node)
      case 'select':
        return this.select(node)
      case 'add':
        return this.add(node)
    }
  }

  private lowerFused(node: Node | SkinnyNode, products: FusedProducts): Command {
    if (node.kind !== 'skinny') return this.lower(node)
    const rows = rowsOf(node)
    const apart = this.partsOf(node)
    return (step) => {
      if (step[rows] === 0) return
      const launch = products.launch(node, step[rows])
      if (launch) this.context.driver.launch(launch, step.stream)
      else for (const command of apart) command(step)
    }
  }

  /** The parts of a product one by one, where no kernel does them together. */
  private partsOf({ linear, norm, rope, glu }: SkinnyNode): Command[] {
    if (linear.kind === 'linear' && this.e4m3?.has(linear)) {
      return [() => assert(false, 'few tokens have kernels for all products of e4m3, or for none')]
    }
    const parts = this.nodes.filter(
      (part) =>
        part === linear ||
        part === rope ||
        part === glu ||
        (part.kind === 'norm' && norm !== undefined && part.out === linear.in),
    )
    return parts.map((part) => this.lower(part))
  }

  private embed({ out, weight, scale }: Extract<Node, { kind: 'embed' }>): Command {
    const { weights, state } = this.context
    const { address, rows: vocab, k } = weights.joined([weight])
    const launch = this.kernel('embed.cu', 'embed', ['u64', 'u64', 'u64', 'i32', 'i32', 'f32'])
    launch.setAll(address, state.tokens, this.place(out).address, k, vocab, scale)
    launch.threads(Math.min(1024, warps(k)))
    return this.perRow(launch, 'tokens')
  }

  private norm({ x, added, post, norm, out, rows }: NormNode): Command {
    const { weights } = this.context
    const { width, address } = this.place(x)
    checkWidth(width)
    const kinds: ArgumentKind[] = ['u64', 'u64', 'u64', 'u64', 'u64', 'i32', 'f32']
    const launch = this.kernel('norm.cu', 'normRow', kinds)
    const addresses = [address, this.addressOf(added), weights.vector(post?.weight)]
    const eps = present(norm ?? post, 'a norm').eps
    launch.setAll(...addresses, weights.vector(norm?.weight), this.addressOf(out), width, eps)
    const threads = (count: number) => Math.min(1024, warps(width / (count > MANY_ROWS ? 16 : 8)))
    return (step) => {
      const count = step[rows]
      if (count === 0) return
      this.context.driver.launch(launch.threads(threads(count)).grid(count), step.stream)
    }
  }

  private rope({ q, qOut, k, v, rope, layer, rows }: RopeNode, around?: Surroundings): Command {
    const { weights, state, layout } = this.context
    const { heads, kvHeads, headDim, normEps } = this.program.config
    const kinds: ArgumentKind[] = [
      ...(['u64', 'u64', 'u64', 'i32', 'i32', 'u64', 'u64', 'u64', 'u64', 'i32'] as const),
      ...(['i32', 'f32', 'u64', 'u64', 'f32', 'i32', 'i32', 'i32', 'u64', 'u64'] as const),
    ]
    const launch = around
      ? this.kernel('rope-append.cu', 'ropeAppendScaled', [...kinds, 'u64', 'u64'])
      : this.kernel('rope-append.cu', 'ropeAppend', kinds)
    const { address, magnitude } = this.context.ropeTable(rope)
    const { positions, bases } = state.rows[rows]
    checkTurning(rope.dimensions, headDim)
    launch.setAll(
      ...[this.addressOf(q?.value), this.addressOf(k?.value), this.addressOf(v)],
      ...[q ? this.place(q.value).stride : 0, k ? this.place(k.value).stride : 0],
      ...[this.addressOf(qOut), positions, bases, address, rope.dimensions],
      ...[rope.pairing === 'interleaved' ? 1 : 0, magnitude],
      ...[weights.vector(q?.norm?.weight), weights.vector(k?.norm?.weight)],
      ...[q?.norm?.eps ?? normEps, heads, kvHeads, headDim],
      ...[layout.tokenStride, layer * layout.layerStride],
      ...(around ? [around.rowScales, around.tokenScales] : []),
    )
    const lanes =
      ((q ? heads : 0) + (k ? 2 * kvHeads : 0)) * 2 ** Math.ceil(Math.log2(headDim / 16))
    launch.threads(Math.min(warps(lanes), TURNING_THREADS))
    const blocks = Math.ceil(lanes / TURNING_THREADS)
    return (step) => {
      if (step[rows] > 0) this.context.driver.launch(launch.grid(step[rows], blocks), step.stream)
    }
  }

  private attention({ q, out, layer, window, rows }: AttentionNode): Command {
    const { attention, state } = this.context
    const [from, to] = [this.place(q), this.place(out)]
    const { regions: slots, lengths } = state.rows[rows]
    const decode = (step: StepShape, count: number) =>
      attention.decode(
        step.stream,
        { q: from.address, out: to.address, slots, lengths, rows: count },
        layer,
        window,
      )
    if (rows === 'outputs') return (step) => step.outputs > 0 && decode(step, step.outputs)
    return (step) => {
      if (step.singles > 0) decode(step, step.singles)
      if (step.segments === 0) return
      const { firstRows, starts, counts, regions } = state.segments
      const segments = { firstRows, starts, counts, slots: regions, segments: step.segments }
      attention.prefill(
        step.stream,
        { q: from.address, out: to.address, ...segments },
        layer,
        window,
      )
    }
  }

  private glu({ gate, out, activation, rows }: GluNode): Command {
    const width = this.place(gate).width
    checkWidth(width)
    const launch = this.kernel('glu.cu', 'glu', ['u64', 'u64', 'i32', 'i32'])
    launch.setAll(this.addressOf(gate), this.addressOf(out), width, activation === 'gelu' ? 1 : 0)
    launch.threads(256)
    const blocks = Math.ceil(width / 8 / 256)
    return (step) => {
      if (step[rows] > 0) this.context.driver.launch(launch.grid(blocks, step[rows]), step.stream)
    }
  }

  private select({ in: from, out }: Extract<Node, { kind: 'select' }>): Command {
    const { width, address } = this.place(from)
    checkWidth(width)
    const launch = this.kernel('rows.cu', 'selectRows', ['u64', 'u64', 'u64', 'i32'])
    launch.setAll(address, this.context.state.outputRows, this.addressOf(out), width)
    launch.threads(Math.min(512, warps(width / 8)))
    return this.perRow(launch, 'outputs')
  }

  private add({ a, b, out, rows }: Extract<Node, { kind: 'add' }>): Command {
    const { width } = this.place(a)
    checkWidth(width)
    const launch = this.kernel('rows.cu', 'addRows', ['u64', 'u64', 'u64', 'u64'])
    launch.setAll(this.addressOf(a), this.addressOf(b), this.addressOf(out), 0).threads(256)
    return (step) => {
      const count = (step[rows] * width) / 8
      if (count === 0) return
      launch.set(3, count).grid(Math.ceil(count / 256))
      this.context.driver.launch(launch, step.stream)
    }
  }

  private matmul(node: LinearNode | LogitsNode): Command {
    const { matmuls } = this.context
    const { product, weight, x, out } = this.productOf(node)
    const rows = node.kind === 'logits' ? 'outputs' : node.rows
    const linear = node.kind === 'linear' ? node : undefined
    const narrow = linear && this.e4m3?.has(linear) ? linear : undefined
    const before = (narrow && this.e4m3?.before(narrow)) ?? []
    const scaling = (narrow && this.e4m3?.after(narrow)) ?? []
    const after = [...scaling, ...(linear ? this.biases(linear) : [])]
    return (step) => {
      if (step[rows] === 0) return
      for (const command of before) command(step)
      matmuls.run(product, step[rows], this.room[rows], weight, x, out, step.stream)
      for (const command of after) command(step)
    }
  }

  private productOf(node: LinearNode | LogitsNode): Operands {
    const { weights, logits } = this.context
    const x = this.place(node.in).address
    if (node.kind === 'logits') {
      const { address, rows: m, k } = weights.joined([node.weight])
      const product = { m, k, stride: m, float32: true, accumulate: false }
      return { product, weight: address, x, out: logits }
    }
    const { address: weight, rows: m, k } = weights.joined(node.weights)
    if (this.e4m3?.has(node)) {
      const { stride, ...operands } = this.e4m3.operands(node)
      const product = { m, k, stride, float32: false, accumulate: false, e4m3: true }
      return { product, weight, ...operands }
    }
    const to = this.place(present(node.outs[0], 'a product'))
    const { accumulate } = node
    const product = { m, k, stride: to.stride, float32: false, accumulate }
    return { product, weight, x, out: to.address }
  }

  private biases({ outs, biases, rows }: LinearNode): Command[] {
    return outs.flatMap((out, i) => {
      const bias = biases[i]
      if (bias === undefined) return []
      const { address, width, stride } = this.place(out)
      const launch = this.kernel('rows.cu', 'addBias', ['u64', 'u64', 'i32', 'i32'])
      launch.setAll(address, this.context.weights.vector(bias), width, stride)
      return [this.perRow(launch.threads(Math.min(256, warps(width))), rows)]
    })
  }

  /** A kernel that may start while the one before it ends; see `awaitInputs` in common.cuh. */
  private kernel(file: string, name: string, kinds: readonly ArgumentKind[]): KernelLaunch {
    const launch = new KernelLaunch(this.context.find(file, name), kinds)
    return this.context.overlap ? launch.programmatic() : launch
  }

  private perRow(launch: KernelLaunch, rows: Rows): Command {
    return (step) => {
      if (step[rows] > 0) this.context.driver.launch(launch.grid(step[rows]), step.stream)
    }
  }

  private place(value: Value): { address: number; stride: number; width: number } {
    const { offset, stride, width } = this.buffers.place(value)
    return { address: this.arena + offset, stride, width }
  }

  private addressOf(value: Value | undefined): number {
    return value === undefined ? 0 : this.place(value).address
  }
}

/** Rows that fill a device by themselves: each has fewer threads, which do more one by one. */
const MANY_ROWS = 256

/** Of a block of the rotation: best for 64, 512 and 2,048 rows of 48 heads of 128. */
const TURNING_THREADS = 128

type AttentionNode = Extract<Node, { kind: 'attention' }>

function nameOf(node: Node): string {
  const weight = node.kind === 'linear' ? node.weights[0] : 'weight' in node ? node.weight : ''
  return `${node.kind} ${weight?.replace(/^blk\.\d+\./, '').replace(/\.weight$/, '')}`.trim()
}

/** Threads for `count` elements, a whole number of warps. */
function warps(count: number): number {
  return Math.ceil(count / 32) * 32
}

function checkWidth(width: number): void {
  if (width % 8 === 0) return
  throw new LatticeError('model_unsupported', `Rows of ${width} elements do not suit the GPU.`, {
    todo: 'Use --device cpu; the GPU takes rows of a multiple of 8 elements.',
  })
}

/** A lane turns eight pairs. */
function checkTurning(dimensions: number, headDim: number): void {
  if (dimensions % 16 === 0 && headDim % 16 === 0) return
  const what = `Heads of ${headDim}, of which ${dimensions} turn, do not suit the GPU.`
  throw new LatticeError('model_unsupported', what, {
    todo: 'Use --device cpu; the GPU takes multiples of 16.',
  })
}
