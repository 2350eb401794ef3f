// Owns the plan of a decode step in one kernel: the table of phases that kernels/decode-step.cu
// follows, and how the kernel is specialised for a model and a GPU. Pure: it knows no device.

import type { ModelConfig, RopeConfig } from '../../model/model.ts'
import type { Value } from '../../model/program.ts'
import type { Node, Norm, SkinnyNode } from './fuse.ts'

/** As phases.cuh numbers them. */
export const PHASE = { store: 0, add: 1, glu: 2, logits: 3, rope: 4, attention: 5 } as const

export type PhaseKind = keyof typeof PHASE

export interface Phase {
  kind: PhaseKind
  /** Matrices side by side; none for attention. */
  weights: readonly string[]
  in: Value
  /** Undefined for logits. */
  out: Value | undefined
  norm: Norm | undefined
  gelu: boolean
  layer: number
  rope: RopeConfig | undefined
  window: number | undefined
}

/** Why a model's steps cannot be one kernel. */
export interface Unplanned {
  reason: string
}

/**
 * What follows the embedding, phase by phase.
 * @param nodes as `fuseSkinny` makes them
 */
export function planStep(nodes: readonly (Node | SkinnyNode)[]): Phase[] | Unplanned {
  const phases: Phase[] = []
  const none = { norm: undefined, gelu: false, layer: 0, rope: undefined, window: undefined }
  for (const node of nodes.slice(1)) {
    if (node.kind === 'attention') {
      const { q, out, layer, window } = node
      phases.push({ ...none, kind: 'attention', weights: [], in: q, out, layer, window })
      continue
    }
    if (node.kind !== 'skinny') return { reason: `there is a ${node.kind} between its products` }
    const { linear, norm, rope, glu } = node
    const common = { ...none, in: node.in, norm }
    if (linear.kind === 'logits') {
      phases.push({ ...common, kind: 'logits', weights: [linear.weight], out: undefined })
      continue
    }
    const { weights, outs, biases, accumulate } = linear
    if (biases.some((bias) => bias !== undefined)) return { reason: 'its projections have biases' }
    if (rope) {
      const turn = { rope: rope.rope, layer: rope.layer }
      phases.push({ ...common, ...turn, kind: 'rope', weights, out: rope.qOut })
    } else if (glu) {
      const gelu = glu.activation === 'gelu'
      phases.push({ ...common, kind: 'glu', weights, out: glu.out, gelu })
    } else {
      phases.push({ ...common, kind: accumulate ? 'add' : 'store', weights, out: outs[0] })
    }
  }
  const ropes = new Set(phases.flatMap(({ rope }) => rope ?? []))
  return ropes.size === 1 ? phases : { reason: `heads turn in ${ropes.size} ways` }
}

export interface StepVariant {
  defines: Readonly<Record<string, number>>
  threads: number
  /** Dynamic shared memory. */
  sharedBytes: number
  /** Attention's scratch. */
  partialFloats: number
}

export interface StepShape {
  config: Pick<ModelConfig, 'heads' | 'kvHeads' | 'headDim'>
  /** Elements of the rows that products take, and of those among them that are normed first. */
  inputs: readonly number[]
  normed: readonly number[]
}

/** @param kOf elements of a row of matrices that are side by side */
export function stepShape(
  plan: readonly Phase[],
  config: StepShape['config'],
  kOf: (weights: readonly string[]) => number,
): StepShape {
  const products = plan.filter(({ kind }) => kind !== 'attention')
  const normed = products.filter(({ norm }) => norm !== undefined)
  const lengths = (of: readonly Phase[]) => of.map(({ weights }) => kOf(weights))
  return { config, inputs: lengths(products), normed: lengths(normed) }
}

const WARPS = 8
const THREADS = 32 * WARPS
/** Of a block's shared memory: barriers, phases, and what the driver keeps. */
const OTHER_BYTES = 4 << 10
/** Longer ones, up to 8 KiB, are as good while a warp has as many bytes; shorter ones are not. */
const SEGMENTS = [4096, 2048, 1024]
const SLOTS_MIN = 3
const SLOTS_MAX = 6
/** What a block reads ahead of a phase's end; see weight-stream.cuh. */
const HOLD_BYTES = 64 << 10
/** Percent of a phase's rows that go to whoever is first. */
const TAKEN = 12
/** More stretches than this take longer to merge than to read. */
const SPLITS_MAX = 32
const GROUP_MAX = 8

/**
 * The variant for a number of tokens, or why there is none.
 * @param multiprocessors of the GPU, each of which has a block
 * @param sharedBytes that a block may have
 */
export function stepVariant(
  { config: { heads, kvHeads, headDim }, inputs, normed }: StepShape,
  tokens: number,
  multiprocessors: number,
  sharedBytes: number,
): StepVariant | Unplanned {
  if (tokens !== 1 && tokens !== 2 && tokens !== 4) return { reason: 'steps are of 1, 2 or 4 rows' }
  const group = heads / kvHeads
  if (![32, 64, 96, 128].includes(headDim) || group > GROUP_MAX) {
    return { reason: `attention has ${group} heads of ${headDim} for each of its keys` }
  }
  const odd = inputs.find((k) => k % 8 !== 0)
  if (odd !== undefined) return { reason: `a row of ${odd} elements is no whole 16 bytes` }
  const splits = Math.min(SPLITS_MAX, Math.floor(multiprocessors / (tokens * kvHeads)))
  if (splits < 1) return { reason: `${multiprocessors} multiprocessors are too few` }
  const attention = WARPS * group * (headDim + 2) * 4
  const input = Math.ceil(Math.max(tokens * Math.max(...inputs) * 2, attention) / 128) * 128
  const room = Math.floor((sharedBytes - OTHER_BYTES - input) / WARPS)
  const segment = SEGMENTS.find((bytes) => bytes * SLOTS_MIN <= room)
  if (segment === undefined) return { reason: `its inputs take ${input} bytes of shared memory` }
  const slots = Math.min(SLOTS_MAX, Math.floor(room / segment))
  return {
    defines: {
      TOKENS: tokens,
      WARPS,
      SLOTS: slots,
      SEGMENT: segment,
      INPUT_BYTES: input,
      NORM_CHUNKS: Math.ceil(Math.max(8, ...normed) / 8 / THREADS),
      HEADS: heads,
      KV_HEADS: kvHeads,
      HEAD_DIM: headDim,
      SPLITS: splits,
      TAKEN,
      HOLD: Math.max(1, Math.floor(HOLD_BYTES / WARPS / segment)),
    },
    threads: THREADS,
    sharedBytes: WARPS * slots * segment + input,
    partialFloats: tokens * kvHeads * splits * group * (headDim + 2),
  }
}
