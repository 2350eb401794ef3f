// Owns the launches of skinny-hopper.cu: a product of 5–128 tokens with its sum, activation or
// rotation as one kernel, where that was measured to be faster than the matrix library.

import { present } from '../../assert.ts'
import { type CudaDriver, FUNCTION } from '../../ffi/cuda.ts'
import { type ArgumentKind, KernelLaunch } from '../../ffi/kernel-launch.ts'
import type { ModelConfig } from '../../model/model.ts'
import type { Rows, Value } from '../../model/program.ts'
import type { SkinnyNode } from './fuse.ts'
import { GEMV_EPILOGUE, type GemvEpilogue } from './gemv.ts'
import { hopperColumns, type HopperVariant, hopperVariants } from './hopper-products.ts'
import type { KernelFinder } from './kernels.ts'
import type { LowerContext } from './lower-context.ts'
import type { Matrix } from './weights.ts'

/** Products that take along what surrounds them. */
export interface FusedProducts {
  /** Undefined where they are to be done in parts. */
  launch(node: SkinnyNode, tokens: number): KernelLaunch | undefined
}

/** Arguments of `skinny`, in their order. */
const KINDS: readonly ArgumentKind[] = [
  ...(['bytes128', 'bytes128', 'i32', 'i32', 'i32', 'i32', 'i32', 'i32', 'u64', 'i32'] as const),
  ...(['i32', 'u64', 'u64', 'u64', 'i32', 'f32', 'i32', 'i32', 'i32', 'u64', 'u64'] as const),
]
const ARGUMENT = { weights: 0, x: 1, tokens: 4 } as const

/** cuTensorMapEncodeTiled's numbers (cuda.h). */
const TENSOR_MAP = { bfloat16: 9, swizzle128: 3, promotion256: 3 } as const
const COLUMNS_OF_BOX = 64
const BF16 = 2

/** Variants that are measured. */
export const CANDIDATES = 5
/** Below this, matrices come from L2 anyway, and launches are what takes time. */
const MATRIX_BYTES_MIN = 4 << 20
const LIBRARY = 'library'
/**
 * What own kernels may be slower by when measured one after another: between other kernels they
 * have their first weights before those have ended.
 */
const PATIENCE = 1.03

type Place = { address: number; stride: number; width: number }

/** One product; addresses are the device's, strides in elements. */
export interface HopperProduct {
  /** [rows, k] bf16 */
  weight: number
  rows: number
  k: number
  /** [tokens, k] bf16, of as many rows as there may be read. */
  x: { address: number; stride: number; rows: number }
  tokens: number
  epilogue: GemvEpilogue
  out: { address: number; stride: number }
  gelu: boolean
  /** Of the rotation: as rope-append.cu takes them. */
  positions: number
  slots: number
  frequencies: number
  magnitude: number
  heads: { heads: number; kvHeads: number; headDim: number }
  tokenStride: number
  layerOffset: number
}

/** A launch of a variant; `room` is dynamic shared memory that a block can have, in bytes. */
export function hopperLaunch(
  driver: CudaDriver,
  find: KernelFinder,
  room: number,
  variant: HopperVariant,
  product: HopperProduct,
): KernelLaunch {
  const { sharedBytes, split, stages, blocks, threads } = variant
  const kernel = find('skinny-hopper.cu', 'skinny', variant.defines)
  driver.setFunctionAttribute(kernel, FUNCTION.dynamicSharedBytesMax, room)
  const launch = new KernelLaunch(kernel, KINDS)
  launch.grid(blocks).threads(threads).sharedBytes(sharedBytes)
  if (split > 1) launch.cluster(split)
  const { weight, rows, k, x, tokens, epilogue, out } = product
  const map = (at: number, address: number, count: number, stride: number, box: number) =>
    driver.encodeTensorMap(launch.addressOfArgument(at), {
      ...{ dataType: TENSOR_MAP.bfloat16, address, dimensions: [k, count] },
      ...{ strides: [stride * BF16], box: [COLUMNS_OF_BOX, box] },
      ...{ swizzle: TENSOR_MAP.swizzle128, l2Promotion: TENSOR_MAP.promotion256 },
    })
  map(ARGUMENT.weights, weight, rows, k, variant.weightBox)
  map(ARGUMENT.x, x.address, Math.min(variant.tokens, x.rows), x.stride, variant.tokens)
  const { positions, slots, frequencies, magnitude, tokenStride, layerOffset } = product
  const { heads, kvHeads, headDim } = product.heads
  const values = [
    ...[rows, k, tokens, split, stages, GEMV_EPILOGUE[epilogue], out.address, out.stride],
    ...[product.gelu ? 1 : 0, positions, slots, frequencies, headDim, magnitude],
    ...[heads, kvHeads, headDim, tokenStride, layerOffset],
  ]
  values.forEach((value, i) => launch.set(2 + i, value))
  return launch
}

export class HopperProducts implements FusedProducts {
  private readonly context: LowerContext
  private readonly config: ModelConfig
  private readonly place: (value: Value) => Place
  private readonly room: Readonly<Record<Rows, number>>
  /** By node and columns of its tiles; null where the library is faster. */
  private readonly launches = new Map<SkinnyNode, (KernelLaunch | null)[]>()

  /** @param room rows that buffers have */
  constructor(
    context: LowerContext,
    config: ModelConfig,
    place: (value: Value) => Place,
    room: Readonly<Record<Rows, number>>,
  ) {
    this.context = context
    this.config = config
    this.place = place
    this.room = room
  }

  launch(node: SkinnyNode, tokens: number): KernelLaunch | undefined {
    let ofNode = this.launches.get(node)
    if (!ofNode) this.launches.set(node, (ofNode = []))
    const columns = hopperColumns(tokens) ?? 0
    let launch = ofNode[columns]
    if (launch === undefined) ofNode[columns] = launch = this.chosen(node, tokens) ?? null
    return launch?.set(ARGUMENT.tokens, tokens)
  }

  /**
   * Measures, for every shape among `nodes` that is not known yet, the likeliest variants and the
   * library's way.
   * @param apart queues a node's parts one by one
   */
  tune(
    nodes: readonly SkinnyNode[],
    tokens: number,
    stream: number,
    microseconds: (queue: () => void) => number,
    apart: (node: SkinnyNode) => void,
  ): void {
    const { driver, choices } = this.context
    const groups = Map.groupBy(nodes, (node) => this.keyOf(node, tokens))
    for (const [key, group] of groups) {
      const variants = this.variantsOf(present(group[0], 'a node'), tokens)
      if (choices.get(key) !== undefined || variants.length === 0) continue
      let best = { id: LIBRARY, us: microseconds(() => group.forEach(apart)) * PATIENCE }
      for (const variant of variants.slice(0, CANDIDATES)) {
        const launches = group.map((node) => this.make(node, tokens, variant))
        const us = microseconds(() => launches.forEach((launch) => driver.launch(launch, stream)))
        if (us < best.us) best = { id: idOf(variant), us }
      }
      choices.set(key, best.id)
    }
    // What was chosen before is not what would be now.
    this.launches.clear()
  }

  private chosen(node: SkinnyNode, tokens: number): KernelLaunch | undefined {
    const id = this.context.choices.get(this.keyOf(node, tokens))
    const always = this.context.hopper === 'always'
    const variant = this.variantsOf(node, tokens).find((one) => always || idOf(one) === id)
    return variant && this.make(node, tokens, variant)
  }

  private variantsOf(node: SkinnyNode, tokens: number): HopperVariant[] {
    const { multiprocessors, hopperRoom, hopper } = this.context
    const matrix = this.matrixOf(node)
    if (isSmall(matrix) && hopper !== 'always') return []
    return variantsOf(node, matrix, this.config.headDim, tokens, multiprocessors, hopperRoom)
  }

  private make(node: SkinnyNode, tokens: number, variant: HopperVariant): KernelLaunch {
    const { driver, find, state, layout, hopperRoom, overlap } = this.context
    const { rope, glu } = node
    const { address, rows, k } = this.matrixOf(node)
    const x = this.place(node.in)
    const { positions, bases: slots } = state.rows[rowsOf(node)]
    const turn = rope && this.context.ropeTable(rope.rope)
    const launch = hopperLaunch(driver, find, hopperRoom, variant, {
      ...{ weight: address, rows, k, tokens, epilogue: epilogueOf(node) },
      x: { address: x.address, stride: x.stride, rows: this.room[rowsOf(node)] },
      out: this.outOf(node),
      gelu: glu?.activation === 'gelu',
      ...{ positions, slots, frequencies: turn?.address ?? 0, magnitude: turn?.magnitude ?? 1 },
      heads: this.config,
      tokenStride: layout.tokenStride,
      layerOffset: (rope?.layer ?? 0) * layout.layerStride,
    })
    return overlap ? launch.programmatic() : launch
  }

  private outOf({ linear, rope, glu }: SkinnyNode): { address: number; stride: number } {
    const { logits, weights } = this.context
    if (linear.kind === 'logits') {
      return { address: logits, stride: weights.joined([linear.weight]).rows }
    }
    return this.place(present(rope?.qOut ?? glu?.out ?? linear.outs[0], 'what a product makes'))
  }

  private matrixOf({ linear }: SkinnyNode): Matrix {
    const { weights } = this.context
    return weights.joined(linear.kind === 'logits' ? [linear.weight] : linear.weights)
  }

  private keyOf(node: SkinnyNode, tokens: number): string {
    const { rows, k } = this.matrixOf(node)
    return `${rows} ${k} ${hopperColumns(tokens)} ${epilogueOf(node)}`
  }
}

/** Whether nothing is to be won by an own kernel. */
export function isSmall({ rows, k }: Pick<Matrix, 'rows' | 'k'>): boolean {
  return rows * k * BF16 < MATRIX_BYTES_MIN
}

/** The likeliest to be fastest first; none where the kernel is not made for a node. */
export function variantsOf(
  node: SkinnyNode,
  { rows, k }: Pick<Matrix, 'rows' | 'k'>,
  headDim: number,
  tokens: number,
  multiprocessors: number,
  room: number,
): HopperVariant[] {
  const { linear, rope } = node
  const biased = linear.kind === 'linear' && linear.biases.some((bias) => bias !== undefined)
  // Pairs of which both halves of a whole head are made.
  const halves = rope && rope.rope.pairing !== 'interleaved' && rope.rope.dimensions === headDim
  if (biased || (rope && !halves)) return []
  const shape = { rows, k, tokens, epilogue: epilogueOf(node), headDim }
  return hopperVariants(shape, multiprocessors, room)
}

export function rowsOf({ linear }: SkinnyNode): Rows {
  return linear.kind === 'logits' ? 'outputs' : linear.rows
}

function epilogueOf({ linear, rope, glu }: SkinnyNode): GemvEpilogue {
  if (linear.kind === 'logits') return 'logits'
  if (rope) return 'rope'
  if (glu) return 'glu'
  return linear.accumulate ? 'add' : 'store'
}

function idOf({ defines, split, stages }: HopperVariant): string {
  return `${defines['ROWS']}/${split}/${stages}`
}
