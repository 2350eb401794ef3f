// Owns the launches around products of e4m3: what the kernels before and after one are given, so
// that they quantise and scale on their way.

import { present } from '../../assert.ts'
import { KernelLaunch } from '../../ffi/kernel-launch.ts'
import type { Rows, Value } from '../../model/program.ts'
import { type E4m3Plan, planE4m3 } from './e4m3.ts'
import { type E4m3, quantiseLaunch, rowThreads } from './e4m3-rows.ts'
import type { GluNode, LinearNode, Node, NormNode } from './fuse.ts'
import type { LowerContext, StepShape } from './lower-context.ts'

type Place = { address: number; stride: number; width: number }

type Command = (step: StepShape) => void

/** What a node of e4m3's surroundings is told. Addresses are 0 where there is nothing. */
export interface Surroundings {
  /** Where it writes e4m3, and the scales of these rows. */
  out: number
  outScales: number
  /** Of what it reads: by rows of the matrix, and by tokens. */
  rowScales: number
  tokenScales: number
  /** A product that a norm is to add to the residual stream, too. */
  added: number
}

/** Products of one program. */
export class E4m3Products {
  private readonly context: LowerContext
  private readonly e4m3: E4m3
  private readonly plan: E4m3Plan
  private readonly place: (value: Value) => Place
  /** By the nodes before and after products. */
  private readonly makes = new Map<Node, LinearNode>()
  private readonly reads = new Map<Node, LinearNode>()

  constructor(
    context: LowerContext,
    e4m3: E4m3,
    nodes: readonly Node[],
    place: (value: Value) => Place,
  ) {
    this.context = context
    this.e4m3 = e4m3
    this.plan = planE4m3(nodes, e4m3.names)
    this.place = place
    for (const [product, node] of this.plan.narrowing) this.makes.set(node, product)
    for (const [product, node] of this.plan.scaling) this.reads.set(node, product)
  }

  has(node: LinearNode): boolean {
    return this.plan.products.has(node)
  }

  /** Where a product's input lies, and where its sums go, which are to be scaled yet. */
  operands(node: LinearNode): { x: number; out: number; stride: number } {
    const { address, stride } = this.place(present(node.outs[0], 'a product'))
    return { x: this.e4m3.x, out: node.accumulate ? this.e4m3.raw : address, stride }
  }

  /** Undefined for a node without e4m3 on either side. */
  around(node: Node): Surroundings | undefined {
    const product = this.reads.get(node)
    const makes = this.makes.has(node)
    if (!product && !makes) return undefined
    const { x, scales, raw } = this.e4m3
    return {
      out: makes ? x : 0,
      outScales: makes ? scales : 0,
      rowScales: product ? this.context.weights.joined(product.weights).scales : 0,
      tokenScales: product ? scales : 0,
      added: product?.accumulate ? raw : 0,
    }
  }

  /** A norm beside products of e4m3; undefined for any other. */
  norm(node: NormNode): Command | undefined {
    const around = this.around(node)
    if (!around) return undefined
    const { x, added, post, norm, out, rows } = node
    const { weights } = this.context
    const { width, address } = this.place(x)
    const name = width / 8 <= NORM_THREADS ? 'normRowE4m3' : 'normRowE4m3Wide'
    const kernel = this.context.find('norm.cu', name)
    const launch = new KernelLaunch(kernel, [...NORM_KINDS, ...SCALES_KINDS])
    const vectors = [weights.vector(post?.weight), weights.vector(norm?.weight)]
    const from = [address, around.added || this.addressOf(added), ...vectors]
    const { eps } = present(norm ?? post, 'a norm')
    launch.setAll(...from, around.out || this.addressOf(out), width, eps, ...scalesOf(around))
    launch.threads(Math.min(NORM_THREADS, Math.ceil(width / 8 / 32) * 32))
    return this.command(launch, (count) => launch.grid(count), rows)
  }

  /** A gated activation beside products of e4m3; undefined for any other. */
  glu(node: GluNode): Command | undefined {
    const around = this.around(node)
    if (!around) return undefined
    const { gate, out, activation, rows } = node
    const { width, address } = this.place(gate)
    const [few, many] = (['gluE4m3', 'gluE4m3Many'] as const).map((name) => {
      const launch = new KernelLaunch(this.context.find('glu.cu', name), [
        ...(['u64', 'u64', 'i32', 'i32'] as const),
        ...SCALES_KINDS,
      ])
      const to = around.out || this.addressOf(out)
      launch.setAll(address, to, width, activation === 'gelu' ? 1 : 0, ...scalesOf(around))
      launch.threads(rowThreads(width))
      return this.command(launch, (count) => launch.grid(count), rows)
    }) as [Command, Command]
    const most = width <= FEW_WIDTH_MAX ? 2 * this.context.multiprocessors : 0
    return (step) => (step[rows] <= most ? few(step) : many(step))
  }

  private addressOf(value: Value | undefined): number {
    return value === undefined ? 0 : this.place(value).address
  }

  /** What is queued before a product, if nothing made its input as e4m3. */
  before(node: LinearNode): Command[] {
    if (this.plan.narrowing.has(node)) return []
    const { address, width } = this.place(node.in)
    const { x, scales } = this.e4m3
    const launch = quantiseLaunch(this.context.find, width).setAll(address, x, scales, width)
    return [this.command(launch, (count) => launch.grid(count), node.rows)]
  }

  /** What scales a product, unless the node after it does. */
  after(node: LinearNode): Command[] {
    if (this.plan.scaling.has(node)) return []
    const matrix = this.context.weights.joined(node.weights)
    const { out, stride } = this.operands(node)
    const { address } = this.place(present(node.outs[0], 'a product'))
    const kernel = this.context.find('quantise.cu', 'scaleProduct')
    const launch = new KernelLaunch(kernel, SCALE_KINDS).threads(SCALE_THREADS)
    launch.setAll(
      ...[out, matrix.scales, this.e4m3.scales, address, matrix.rows, stride, stride],
      node.accumulate ? 1 : 0,
    )
    const blocks = Math.ceil(matrix.rows / 8 / SCALE_THREADS)
    return [this.command(launch, (count) => launch.grid(blocks, count), node.rows)]
  }

  private command(
    launch: KernelLaunch,
    sized: (rows: number) => KernelLaunch,
    rows: Rows,
  ): Command {
    if (this.context.overlap) launch.programmatic()
    const { driver } = this.context
    return (step) => {
      if (step[rows] > 0) driver.launch(sized(step[rows]), step.stream)
    }
  }
}

const NORM_KINDS = ['u64', 'u64', 'u64', 'u64', 'u64', 'i32', 'f32'] as const
const NORM_THREADS = 1024
/** What `gluE4m3` holds of a row. */
const FEW_WIDTH_MAX = 16_384

const SCALES_KINDS = ['u64', 'u64', 'u64'] as const

function scalesOf({ outScales, rowScales, tokenScales }: Surroundings): number[] {
  return [outScales, rowScales, tokenScales]
}

const SCALE_KINDS = ['u64', 'u64', 'u64', 'u64', 'i32', 'i32', 'i32', 'i32'] as const
const SCALE_THREADS = 256
