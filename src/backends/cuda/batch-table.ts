// Owns the table that kernels/batch-step.cu follows, with its tensor maps, as bytes:
// batch-phases.cuh says what they mean.

import { present } from '../../assert.ts'
import type { TensorMapTiled } from '../../ffi/cuda.ts'
import type { ModelConfig } from '../../model/model.ts'
import type { Value } from '../../model/program.ts'
import { arrivalsOf, type BatchPlan } from './batch-plan.ts'
import { PHASE, type Phase, type PhaseKind } from './decode-step.ts'

/** sizeof(Phase) in batch-phases.cuh, and of a tensor map. */
const PHASE_BYTES = 128
export const MAP_BYTES = 128
const NO_WINDOW = 0x7fffffff

/** cuTensorMapEncodeTiled's numbers (cuda.h). */
const TENSOR_MAP = { bytes: 0, bfloat16: 9, swizzle128: 3, promotion256: 3 } as const
const BF16 = 2
const STEP = 64
/** Of the rows of boxes. */
const BOX_BYTES = 128
const BOX_GROUPS = [4, 1]

export interface Matrix {
  address: number
  rows: number
  k: number
  /** Of e4m3: the address of a bf16 for each row; 0 of a matrix of bf16. */
  scales: number
}

/** What the table refers to, on the device. */
export interface BatchPlaces {
  blocks: number
  config: Pick<ModelConfig, 'kvHeads' | 'headDim'>
  /** Columns of the kernel's products. */
  tokens: number
  place: (value: Value) => { address: number; stride: number; width: number }
  matrix: (weights: readonly string[]) => Matrix
  vector: (name: string) => number
  logits: number
  /**
   * What products read, bf16: the first one [tokens, k], others [k / 64, tokens, 64], by the phase
   * that makes it.
   */
  inputs: Readonly<Record<'first' | 'add' | 'attention' | 'glu', number>>
  layerStride: number
  /** Keys and values, in boxes of a tile's tokens and of a warp's. */
  kvMaps: Readonly<Record<'tile' | 'warp', TensorMapTiled>>
}

/** Tensor maps in their order, and the table's bytes for a device address of the first map. */
export class BatchTable {
  readonly maps: TensorMapTiled[] = []
  private readonly plan: BatchPlan
  private readonly places: BatchPlaces
  private readonly mapsOfPhases: { in: number; weights: number }[]
  private readonly known = new Map<string, number>()

  constructor(plan: BatchPlan, places: BatchPlaces) {
    this.plan = plan
    this.places = places
    this.mapsOfPhases = plan.phases.map((phase) => {
      if (phase.kind === 'attention') {
        const { tile, warp } = places.kvMaps
        return { in: this.mapOf('warp', () => warp), weights: this.mapOf('tile', () => tile) }
      }
      const matrix = places.matrix(phase.weights)
      const weights = this.maps.length
      const { headDim } = places.config
      this.maps.push(...BOX_GROUPS.map((groups) => weightMap(phase, matrix, headDim, groups)))
      const { k } = matrix
      const before = plan.phases[plan.phases.indexOf(phase) - 1]?.kind
      const { first } = places.inputs
      const address = isMaker(before) ? places.inputs[before] : first
      const strides = address === first ? [k, STEP] : [STEP, places.tokens * STEP]
      const input = () => tokenMap(address, k, strides, places.tokens)
      return { in: this.mapOf(`${address} ${k}`, input), weights }
    })
  }

  get bytes(): number {
    return this.plan.phases.length * PHASE_BYTES
  }

  /** @param mapsAt where the first tensor map lies on the device */
  write(view: DataView, mapsAt: number): void {
    const { phases, sharings } = this.plan
    const { places } = this
    phases.forEach((phase, i) => {
      const at = i * PHASE_BYTES
      const maps = present(this.mapsOfPhases[i], 'maps')
      const mapAt = (map: number) => mapsAt + map * MAP_BYTES
      const sharing = sharings[i]
      const matrix = sharing ? places.matrix(phase.weights) : { rows: 0, k: 0, scales: 0 }
      const out = this.outOf(phase, matrix)
      const adds = phase.kind === 'add'
      const attends = phase.kind === 'attention'
      const after = phases[i + 1]
      const next = after?.norm
      const addresses = [
        ...[mapAt(maps.weights), mapAt(attends ? maps.weights : maps.weights + 1)],
        ...[mapAt(maps.in), out.address, adds ? places.inputs.add : 0],
        ...[adds && next ? places.vector(next.weight) : 0],
        ...[attends ? places.place(phase.in).address : matrix.scales],
        phase.layer * places.layerStride,
      ]
      addresses.forEach((value, j) => view.setBigUint64(at + j * 8, BigInt(value), true))
      const { groups, steps, tiles, split } = sharing ?? { groups: 0, steps: 0, tiles: 0, split: 1 }
      const { kvHeads, headDim } = places.config
      const evens = adds && this.plan.e4m3 && after?.kind !== 'logits'
      const normed = phase.norm && i > 0 ? present(sharings[i - 1], 'a sum').tiles : 0
      const integers = [
        ...[PHASE[phase.kind], groups, steps, tiles, split],
        ...[phase.kind === 'rope' ? headDim / 16 : 0, out.stride, phase.gelu ? 1 : 0],
        ...[i > 0 ? arrivalsOf(this.plan, i - 1, places.blocks) : 0, normed, matrix.k, 0],
        ...[phase.window ?? NO_WINDOW, phase.layer * 2 * kvHeads, turnsOf(this.plan, i)],
        evens ? 1 : 0,
      ]
      integers.forEach((value, j) => view.setInt32(at + 64 + j * 4, value, true))
      view.setFloat32(at + 108, phase.norm?.eps ?? 0, true)
    })
  }

  private outOf({ kind, out }: Phase, { rows }: { rows: number }) {
    const { logits, inputs, place } = this.places
    if (kind === 'logits') return { address: logits, stride: rows }
    if (kind === 'attention' || kind === 'glu') return { address: inputs[kind], stride: 0 }
    return place(present(out, 'what a phase makes'))
  }

  private mapOf(key: string, make: () => TensorMapTiled): number {
    const known = this.known.get(key)
    if (known !== undefined) return known
    this.known.set(key, this.maps.length)
    return this.maps.push(make()) - 1
  }
}

/** How often blocks have handed each other sums before, and do in a step; see batch-phases.cuh. */
function turnsOf({ phases, sharings }: BatchPlan, i: number): number {
  const shared = phases.filter((_, j) => (sharings[j]?.split ?? 1) > 1)
  const ropes = shared.filter(({ kind }) => kind === 'rope')
  const before = (of: readonly Phase[]) => of.filter((one) => phases.indexOf(one) < i).length
  const bits = [before(shared), shared.length, before(ropes), ropes.length]
  return bits.reduce((word, count, bit) => word | ((count & 1) << bit), 0)
}

const COMMON = {
  dataType: TENSOR_MAP.bfloat16,
  swizzle: TENSOR_MAP.swizzle128,
  l2Promotion: TENSOR_MAP.promotion256,
} as const

/** [heads, groups, 2, 8, k]: rows of a group and their partners, whatever lies between them. */
function weightMap(
  { kind }: Phase,
  { address, rows, k, scales }: Matrix,
  headDim: number,
  boxGroups: number,
): TensorMapTiled {
  const element = scales === 0 ? BF16 : 1
  const row = k * element
  const shape =
    kind === 'rope'
      ? { half: headDim / 2, group: 8, groups: headDim / 16, heads: rows / headDim }
      : kind === 'glu'
        ? { half: rows / 2, group: 8, groups: rows / 16, heads: 1 }
        : { half: 8, group: 16, groups: rows / 16, heads: 1 }
  return {
    ...COMMON,
    dataType: scales === 0 ? TENSOR_MAP.bfloat16 : TENSOR_MAP.bytes,
    address,
    dimensions: [k, 8, 2, shape.groups, shape.heads],
    strides: [
      row,
      shape.half * row,
      shape.group * row,
      kind === 'rope' ? headDim * row : rows * row,
    ],
    box: [BOX_BYTES / element, 8, 2, boxGroups, 1],
  }
}

/** @param strides of tokens, and of 64 elements of each, in elements */
function tokenMap(
  address: number,
  k: number,
  strides: readonly number[],
  tokens: number,
): TensorMapTiled {
  return {
    ...COMMON,
    address,
    dimensions: [STEP, tokens, k / STEP],
    strides: strides.map((stride) => stride * BF16),
    box: [STEP, tokens, 1],
  }
}

/** Whether what a phase makes is what the next one's weights are multiplied by. */
function isMaker(kind: PhaseKind | undefined): kind is 'add' | 'attention' | 'glu' {
  return kind === 'add' || kind === 'attention' || kind === 'glu'
}
