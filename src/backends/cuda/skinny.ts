// Owns the launches of gemv.cu: a product of 1–4 tokens with its norm, bias, sum, activation or
// rotation, as one kernel.

import { present } from '../../assert.ts'
import { FUNCTION } from '../../ffi/cuda.ts'
import { type ArgumentKind, KernelLaunch } from '../../ffi/kernel-launch.ts'
import type { ModelConfig } from '../../model/model.ts'
import type { Value } from '../../model/program.ts'
import type { Node, SkinnyNode } from './fuse.ts'
import {
  gemvAsks,
  gemvBlocks,
  GEMV_STATIC_BYTES,
  GEMV_TOKENS_MAX,
  type GemvEpilogue,
  gemvSharedBytes,
  type GemvVariant,
  gemvVariant,
} from './gemv.ts'
import type { LowerContext } from './lower-context.ts'

const KINDS: readonly ArgumentKind[] = [
  ...(['u64', 'i32', 'u64', 'u64', 'f32', 'i32', 'u64', 'i32', 'u64', 'i32'] as const),
  ...(['u64', 'u64', 'u64', 'i32', 'i32', 'f32', 'i32', 'i32', 'i32', 'u64', 'u64'] as const),
]

const BF16 = 2

type Place = { address: number; stride: number; width: number }

export class SkinnyProducts {
  private readonly context: LowerContext
  private readonly config: ModelConfig
  private readonly place: (value: Value) => Place
  private readonly launches = new Map<SkinnyNode, Map<number, KernelLaunch | undefined>>()

  constructor(context: LowerContext, config: ModelConfig, place: (value: Value) => Place) {
    this.context = context
    this.config = config
    this.place = place
  }

  /** Loads the kernels of a node for every number of tokens: no step waits for one. */
  prepare(node: SkinnyNode): void {
    for (const tokens of SKINNY_TOKENS) this.launch(node, tokens)
  }

  /** The launch for a node and a number of tokens; undefined where the kernel does not fit. */
  launch(node: SkinnyNode, tokens: number): KernelLaunch | undefined {
    let ofNode = this.launches.get(node)
    if (!ofNode) this.launches.set(node, (ofNode = new Map()))
    if (!ofNode.has(tokens)) ofNode.set(tokens, this.make(node, tokens))
    return ofNode.get(tokens)
  }

  private make(node: SkinnyNode, tokens: number): KernelLaunch | undefined {
    const { linear, norm, rope, glu } = node
    const { weights, driver, multiprocessors, prefetchBytes, releaseRounds } = this.context
    const matrix = weights.joined(linear.kind === 'logits' ? [linear.weight] : linear.weights)
    const { k } = matrix
    const e4m3 = matrix.scales !== 0
    const variant = skinnyVariant(node, k, tokens, releaseRounds, e4m3)
    if (!variant) return undefined
    const kernel = this.context.find('gemv.cu', 'gemv', variant.defines)
    const blocks = gemvBlocks(variant, matrix.rows, multiprocessors)
    const shared = gemvSharedBytes(variant, matrix.rows, blocks)
    if (gemvAsks(shared)) {
      // The same whatever the rows: matrices of other rows may have this kernel, too.
      const most = this.context.sharedBytes - GEMV_STATIC_BYTES
      driver.setFunctionAttribute(kernel, FUNCTION.dynamicSharedBytesMax, most)
    }
    const launch = new KernelLaunch(kernel, e4m3 ? [...KINDS, 'u64'] : KINDS)
    if (this.context.overlap) launch.programmatic()
    launch.grid(blocks).threads(variant.threads).sharedBytes(shared)
    const x = this.place(node.in)
    const out = this.outOf(node)
    const turn = rope && this.context.ropeTable(rope.rope)
    const { positions, bases } = this.context.state.rows[rope?.rows ?? 'tokens']
    const { heads, kvHeads, headDim } = this.config
    const { layout } = this.context
    launch.setAll(
      ...[matrix.address, matrix.rows, x.address, weights.vector(norm?.weight), norm?.eps ?? 0],
      ...[Math.floor(prefetchBytes / multiprocessors / (k * BF16)), out.address, out.stride, 0],
      ...[glu?.activation === 'gelu' ? 1 : 0, positions, bases, turn?.address ?? 0],
      ...[rope?.rope.dimensions ?? 0, rope?.rope.pairing === 'interleaved' ? 1 : 0],
      ...[turn?.magnitude ?? 1, heads, kvHeads, headDim, layout.tokenStride],
      (rope?.layer ?? 0) * layout.layerStride,
      ...(e4m3 ? [matrix.scales] : []),
    )
    return launch
  }

  private outOf({ linear, rope, glu }: SkinnyNode): { address: number; stride: number } {
    const { logits, weights } = this.context
    if (linear.kind === 'logits') {
      return { address: logits, stride: weights.joined([linear.weight]).rows }
    }
    return this.place(present(rope?.qOut ?? glu?.out ?? linear.outs[0], 'what a product makes'))
  }
}

/** With half the bytes a kernel's end weighs more: measured, 2 % of a block of an 8B model. */
const E4M3_RELEASE_ROUNDS = 1

/** Numbers of tokens that `gemvVariant` has kernels for. */
export const SKINNY_TOKENS = [1, 2, GEMV_TOKENS_MAX]

/** How gemv.cu is specialised for a node with rows of `k`; undefined where it does not fit. */
export function skinnyVariant(
  node: SkinnyNode,
  k: number,
  tokens: number,
  releaseRounds: number,
  e4m3 = false,
): GemvVariant | undefined {
  const { linear, norm } = node
  if (linear.kind === 'linear' && linear.biases.some((bias) => bias !== undefined)) return undefined
  const variant = gemvVariant(k, tokens, epilogueOf(node), !!norm, e4m3)
  const release = Math.max(releaseRounds, e4m3 ? E4M3_RELEASE_ROUNDS : 0)
  return variant && { ...variant, defines: { ...variant.defines, RELEASE_ROUNDS: release } }
}

/**
 * Whether steps of so many tokens have a kernel for every product of e4m3. If not they have none:
 * what surrounds the library's products leaves half of the work to its neighbours.
 */
export function fewOfE4m3(
  nodes: readonly (Node | SkinnyNode)[],
  tokens: number,
  matrixOf: (names: readonly string[]) => { k: number; e4m3: boolean },
): boolean {
  return nodes.every((node) => {
    if (node.kind !== 'skinny' || node.linear.kind === 'logits') return true
    const { k, e4m3 } = matrixOf(node.linear.weights)
    return !e4m3 || skinnyVariant(node, k, tokens, 0, e4m3) !== undefined
  })
}

function epilogueOf({ linear, rope, glu }: SkinnyNode): GemvEpilogue {
  if (linear.kind === 'logits') return 'logits'
  if (rope) return 'rope'
  if (glu) return 'glu'
  return linear.accumulate ? 'add' : 'store'
}
