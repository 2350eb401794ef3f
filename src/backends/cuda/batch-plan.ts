// Owns the plan of a decode step of 5–64 rows in one kernel: which blocks share which part of each
// matrix, how kernels/batch-step.cu is specialised, and why a model's steps cannot be so. Pure: it
// knows no device.

import { present } from '../../assert.ts'
import type { ModelConfig } from '../../model/model.ts'
import type { Phase, PhaseKind, Unplanned } from './decode-step.ts'

/** How a product's phase is shared; see batch-phases.cuh. */
export interface Sharing {
  /** Of 16 rows each. */
  groups: number
  /** Of 64 elements of K, or 128 of e4m3. */
  steps: number
  tiles: number
  /** Blocks that share a tile's K. */
  split: number
}

export interface BatchVariant {
  defines: Readonly<Record<string, number>>
  /** Columns of the products: the most tokens that a step may have. */
  tokens: number
  threads: number
  /** Dynamic shared memory. */
  sharedBytes: number
  /** Parts of attention's results, and of sums, that blocks hand each other. */
  partBytes: number
  exchangeBytes: number
}

export interface BatchPlan {
  phases: readonly Phase[]
  /** Whether the matrices of blocks are, all of them. */
  e4m3: boolean
  /** By phase; undefined for attention. */
  sharings: readonly (Sharing | undefined)[]
}

/**
 * Weights of a block of layers below which a kernel a product stays: with less to read between two
 * waits the one kernel was not measured to be faster.
 */
const BLOCK_BYTES_MIN = 256 << 20
/** Of e4m3: with 58 MiB steps of 8 rows are shorter by a ninth, those of 64 are as long. */
const E4M3_BLOCK_BYTES_MIN = 48 << 20
/** The most rows of a step. */
export const BATCH_TOKENS_MAX = 64
/** Fewer have decode-step.cu. */
const FEWEST = 5
const COLUMNS = [32, BATCH_TOKENS_MAX]
const GROUP_ROWS = 16
/** Of K, in bytes of a row of weights. */
const STEP_BYTES = 128
/** Elements of a token's input that lie together. */
const PIECE = 64
/** Of a round, which is all that a block's registers hold. */
const ROUND_GROUPS = 16
/** Of a tile that is added to the residual stream. */
const SUM_GROUPS = 8
const SPLIT = 4
const PAGE_BYTES = 8 << 10
const WORKERS = 2
const WARPS = 4
const CONSUMERS = 32 * WARPS * WORKERS
const THREADS = CONSUMERS + 64
/** Static shared memory and what the driver keeps. */
const OTHER_BYTES = 2 << 10
const PAGES_MIN = 12
/** What is read ahead of a phase's end, in pages. */
const HOLD = 8
const GROUP_MAX = 16
/** Scales of a round's rows of e4m3, in shared memory. */
const SCALES_BYTES = ROUND_GROUPS * GROUP_ROWS * 2

/** Matrices that are side by side. */
export interface BatchMatrix {
  rows: number
  /** Elements of a row. */
  k: number
  e4m3?: boolean
}

/** The kernel's columns for so many rows; undefined if they are too few or too many. */
export function batchColumns(rows: number): number | undefined {
  return rows < FEWEST ? undefined : COLUMNS.find((count) => count >= rows)
}

/** Columns of the kernels that steps of up to so many rows need. */
export function columnsUpTo(rowsMax: number): number[] {
  const rows = [FEWEST, Math.min(rowsMax, BATCH_TOKENS_MAX)].filter((count) => count <= rowsMax)
  return [...new Set(rows.flatMap((count) => batchColumns(count) ?? []))]
}

/**
 * @param phases as `planStep` makes them
 * @param blocks one for each multiprocessor
 * @param small also where there is nothing to be won; for tests
 */
export function planBatch(
  phases: readonly Phase[],
  { heads, kvHeads, headDim }: Pick<ModelConfig, 'heads' | 'kvHeads' | 'headDim'>,
  matrixOf: (weights: readonly string[]) => BatchMatrix,
  blocks: number,
  small = false,
): BatchPlan | Unplanned {
  const ofBlocks = phases.flatMap(({ kind, weights }) =>
    kind === 'attention' || kind === 'logits' ? [] : matrixOf(weights),
  )
  const e4m3 = ofBlocks.every((matrix) => matrix.e4m3)
  if (!e4m3 && ofBlocks.some((matrix) => matrix.e4m3)) {
    return { reason: 'some of its matrices are fp8, others are not' }
  }
  const bytes = ofBlocks.reduce((sum, { rows, k }) => sum + rows * k * (e4m3 ? 1 : 2), 0)
  const layers = phases.filter(({ kind }) => kind === 'attention').length
  if (bytes / layers < (e4m3 ? E4M3_BLOCK_BYTES_MIN : BLOCK_BYTES_MIN) && !small) {
    return { reason: `its blocks have ${Math.round(bytes / layers / 2 ** 20)} MiB of weights only` }
  }
  if ((headDim !== 64 && headDim !== 128) || heads / kvHeads > GROUP_MAX) {
    return { reason: `attention has ${heads / kvHeads} heads of ${headDim} for each of its keys` }
  }
  const sharings: (Sharing | undefined)[] = []
  for (const [i, phase] of phases.entries()) {
    const reason = whyNot(phase, phases[i - 1], phases[i + 1], headDim)
    if (reason !== undefined) return { reason }
    if (phase.kind === 'attention') {
      sharings.push(undefined)
      continue
    }
    const { rows, k } = matrixOf(phase.weights)
    if (rows % (2 * GROUP_ROWS) !== 0 || k % PIECE !== 0) {
      return { reason: `a matrix of ${rows} rows of ${k} is not made of whole groups` }
    }
    const rowBytes = e4m3 && phase.kind !== 'logits' ? k : 2 * k
    const sharing = sharingOf(rows, rowBytes, blocks, phase.kind)
    if (!sharing) return { reason: `a matrix of ${rows} rows of ${k} is cut into no good parts` }
    sharings.push(sharing)
  }
  const shared = sharings.flatMap((sharing) => (sharing && sharing.split > 1 ? sharing.tiles : []))
  if (new Set(shared).size > 1)
    return { reason: 'its matrices are cut into different numbers of tiles' }
  return { phases, e4m3, sharings }
}

/** Why the kernel cannot do a phase between its neighbours. */
function whyNot(
  phase: Phase,
  before: Phase | undefined,
  after: Phase | undefined,
  headDim: number,
): string | undefined {
  const { kind, norm, rope } = phase
  if (kind === 'store') return 'a product is stored as it is'
  if (rope && (rope.pairing === 'interleaved' || rope.dimensions !== headDim)) {
    return 'heads turn in parts'
  }
  if (norm && before && (before.kind !== 'add' || before.out !== phase.in)) {
    return 'what is normed is no sum'
  }
  if (!before && !norm) return 'what is embedded is not normed'
  if (kind === 'add' && !after?.norm) return 'a sum is not normed'
  if (kind === 'add' && norm) return 'what is normed is added to'
  const made = before?.kind === 'attention' || before?.kind === 'glu'
  if (kind === 'add' && (!made || before.out !== phase.in)) {
    return 'what is multiplied is no result of attention or of an activation'
  }
  return undefined
}

/** As evenly as whole groups allow; undefined if a tile that is shared does not fit in a round. */
function sharingOf(
  rows: number,
  rowBytes: number,
  blocks: number,
  kind: PhaseKind,
): Sharing | undefined {
  const groups = rows / GROUP_ROWS
  const steps = Math.ceil(rowBytes / STEP_BYTES)
  const split = kind === 'glu' || kind === 'logits' ? 1 : SPLIT
  const most = Math.ceil(groups / Math.floor(blocks / split))
  const room = kind === 'add' ? SUM_GROUPS : ROUND_GROUPS
  if (split > 1 && (most > room || steps < split)) return undefined
  return { groups, steps, tiles: Math.ceil(groups / most), split }
}

/** @param room shared memory that a block may have */
export function batchVariant(
  { e4m3, sharings }: Omit<BatchPlan, 'phases'>,
  { heads, kvHeads, headDim }: Pick<ModelConfig, 'heads' | 'kvHeads' | 'headDim'>,
  tokens: number,
  blocks: number,
  room: number,
): BatchVariant | Unplanned {
  const group = heads / kvHeads
  const columns = Math.ceil(group / 8)
  const steps = headDim / 16
  const fragments = tokens / 8
  const area = CONSUMERS * columns * (steps + 1) * 16
  const scratch = (CONSUMERS / 32 + 1) * tokens * 4 + (e4m3 ? SCALES_BYTES : 0)
  const pages = Math.floor((room - OTHER_BYTES - area - scratch - 8) / (PAGE_BYTES + 16))
  if (pages < PAGES_MIN) return { reason: `${room} bytes of shared memory are too few` }
  const tiles = Math.max(...sharings.map((of) => (of && of.split > 1 ? of.tiles : 0)))
  if (area < tiles * tokens * 4) return { reason: `sums of squares of ${tiles} tiles` }
  const share = Math.ceil(steps / WARPS)
  return {
    defines: {
      ...{ TOKENS: tokens, PAGES: pages, HOLD, HEADS: heads, KV_HEADS: kvHeads },
      ...{ HEAD_DIM: headDim, GROUP: group, WARPS, ...(e4m3 && { E4M3: 1 }) },
    },
    tokens,
    threads: THREADS,
    sharedBytes: pages * PAGE_BYTES + area + scratch + (2 * pages + 1) * 8,
    partBytes: blocks * WORKERS * WARPS * columns * (share + 1) * 4 * 32 * 8,
    exchangeBytes: tiles * SPLIT * 2 * fragments * CONSUMERS * 16,
  }
}

/** Elements that products read of a row that such a phase makes; of the first product's without. */
export function widthAfter(
  { phases }: Pick<BatchPlan, 'phases'>,
  maker: PhaseKind | undefined,
  kOf: (weights: readonly string[]) => number,
): number {
  const readers = phases.filter(
    ({ kind }, i) => phases[i - 1]?.kind === maker && kind !== 'attention',
  )
  return Math.max(0, ...readers.map(({ weights }) => kOf(weights)))
}

/** Blocks that signal the end of phase `i`. */
export function arrivalsOf({ sharings }: BatchPlan, i: number, blocks: number): number {
  const sharing = present(sharings, 'a plan')[i]
  return sharing ? sharing.tiles * sharing.split : blocks
}
