// Owns decode steps of 5–64 tokens as one cooperative kernel on Hopper: its table and tensor maps
// on the device, its counters and scratch, and its launches. Which models it takes is
// batch-plan.ts's to say.

import { assert, present } from '../../assert.ts'
import { FUNCTION } from '../../ffi/cuda.ts'
import { type ArgumentKind, KernelLaunch } from '../../ffi/kernel-launch.ts'
import { viewMemory } from '../../ffi/libc.ts'
import type { ModelConfig } from '../../model/model.ts'
import type { Value } from '../../model/program.ts'
import {
  BATCH_TOKENS_MAX,
  batchColumns,
  type BatchPlan,
  type BatchVariant,
  batchVariant,
  columnsUpTo,
  planBatch,
  widthAfter,
} from './batch-plan.ts'
import { type BatchPlaces, BatchTable, MAP_BYTES } from './batch-table.ts'
import { type Phase, type PhaseKind, planStep, type Unplanned } from './decode-step.ts'
import { fuseSkinny, type Node } from './fuse.ts'
import type { LowerContext } from './lower-context.ts'

const KINDS: readonly ArgumentKind[] = [
  ...(['u64', 'i32', 'i32', 'i32', 'u64', 'i32', 'u64', 'u64', 'u64', 'u64'] as const),
  ...(['u64', 'u64', 'u64', 'f32', 'u64', 'u64', 'u64', 'u64', 'u64', 'f32'] as const),
]
const TOKENS_ARGUMENT = 5
const NORM_KINDS: readonly ArgumentKind[] = ['u64', 'u64', 'u64', 'u64', 'u64', 'i32', 'f32']
const TENSOR_MAP = { bfloat16: 9, swizzle128: 3, promotion256: 3 } as const
/** Of the GPU's large pages. */
const PAGE_BYTES = 2 << 20
const ALIGNMENT = 256
/** Tokens of boxes of the KV memory: a tile's, and a warp's. */
const BOX_TOKENS = { tile: 64, warp: 16 } as const

type Place = { address: number; stride: number; width: number }

/** All that follows the embedding. */
export interface BatchLaunch {
  /** Of the first block: the only one that is not a part of the sum before. */
  norm: KernelLaunch
  step: KernelLaunch
}

export class BatchSteps {
  private readonly context: LowerContext
  private readonly config: ModelConfig
  private readonly place: (value: Value) => Place
  private readonly plan: BatchPlan | Unplanned
  /** By columns. */
  private readonly launches = new Map<number, BatchLaunch | undefined>()
  private refused: string | undefined
  private readonly blocks: { address: number; free: number }[] = []

  constructor(
    context: LowerContext,
    config: ModelConfig,
    nodes: readonly Node[],
    place: (value: Value) => Place,
  ) {
    this.context = context
    this.config = config
    this.place = place
    this.plan = this.makePlan(nodes)
  }

  /** Why steps of so many rows are more than one kernel; undefined if they are not. */
  whyNot(tokens: number): string | undefined {
    if (batchColumns(tokens) === undefined) return `steps are of up to ${BATCH_TOKENS_MAX} rows`
    return 'reason' in this.plan ? this.plan.reason : this.refused
  }

  /** Makes all that steps of up to so many rows need: a step that is captured may not allocate. */
  prepare(rowsMax: number): void {
    for (const columns of columnsUpTo(rowsMax)) this.launch(columns)
  }

  /** Launches for a step of so many rows; undefined where there are none. */
  launch(tokens: number): BatchLaunch | undefined {
    const columns = batchColumns(tokens)
    if ('reason' in this.plan || columns === undefined) return undefined
    if (!this.launches.has(columns)) this.launches.set(columns, this.make(this.plan, columns))
    const launch = this.launches.get(columns)
    launch?.norm.grid(tokens)
    launch?.step.set(TOKENS_ARGUMENT, tokens)
    return launch
  }

  /** Nothing that was launched may still be running. */
  close(): void {
    for (const block of this.blocks) this.context.driver.free(block.address)
  }

  private readonly k = (names: readonly string[]): number => this.context.weights.joined(names).k

  private makePlan(nodes: readonly Node[]): BatchPlan | Unplanned {
    const { wholeSteps, hopperRoom, hopper, weights, multiprocessors, e4m3 } = this.context
    if (!wholeSteps || (hopper === 'never' && !e4m3)) return { reason: 'it is switched off' }
    if (hopperRoom === 0) return { reason: 'the GPU is no Hopper' }
    const phases = planStep(fuseSkinny(nodes))
    if ('reason' in phases) return phases
    const matrixOf = (names: readonly string[]) => {
      const { rows, k, scales } = weights.joined(names)
      return { rows, k, e4m3: scales !== 0 }
    }
    return planBatch(phases, this.config, matrixOf, multiprocessors, hopper === 'always')
  }

  private make(plan: BatchPlan, columns: number): BatchLaunch | undefined {
    const { driver, find, multiprocessors, hopperRoom, state, layout, kv } = this.context
    const variant = batchVariant(plan, this.config, columns, multiprocessors, hopperRoom)
    if ('reason' in variant) {
      this.refused = variant.reason
      return undefined
    }
    const kernel = find('batch-step.cu', 'batchStep', variant.defines)
    driver.setFunctionAttribute(kernel, FUNCTION.dynamicSharedBytesMax, variant.sharedBytes)
    if (driver.blocksPerMultiprocessor(kernel, variant.threads, variant.sharedBytes) < 1) {
      this.refused = 'a multiprocessor has no room for its block'
      return undefined
    }
    const { phases } = plan
    const first = present(phases[0], 'a phase')
    const { partBytes, exchangeBytes } = variant
    const inputBytes = (after: PhaseKind | undefined) =>
      columns * widthAfter(plan, after, this.k) * 2
    const kinds = [undefined, 'add', 'attention', 'glu'] as const
    const inputsBytes = kinds.reduce((sum, kind) => sum + inputBytes(kind), 0)
    // A phase, its maps, its counter; turns and sums of squares; what products read.
    const rest = phases.length * 1024 + columns * (1024 + multiprocessors * 4) + inputsBytes
    this.reserve(partBytes + exchangeBytes + rest + PAGE_BYTES)
    const inputs = {
      first: this.filled(inputBytes(undefined), 0),
      add: this.filled(inputBytes('add'), 0),
      attention: this.filled(inputBytes('attention'), 0),
      glu: this.filled(inputBytes('glu'), 0),
    }
    const { positions, lengths, bases, regions } = state.rows.tokens
    const rope = present(phases.flatMap((phase) => phase.rope ?? [])[0], 'a rotation')
    const turn = this.context.ropeTable(rope)
    const { headDim } = this.config
    const counters = this.filled(4 * (4 + phases.length), 0)
    const step = new KernelLaunch(kernel, KINDS).cooperative()
    if (this.context.overlap) step.programmatic()
    step.grid(multiprocessors).threads(variant.threads).sharedBytes(variant.sharedBytes)
    step.setAll(
      ...[this.table(plan, variant, inputs), 0, phases.length, 1, counters, columns],
      ...[positions, lengths, bases, regions, kv.address, layout.slotBytes, layout.tokenStride],
      ...[this.config.attentionScale, this.filled(variant.partBytes, 0)],
      ...[this.filled(variant.exchangeBytes, 0xff), this.filled(multiprocessors * columns * 4, 0)],
      ...[this.filled(columns * headDim * 4, 0), turn.address, turn.magnitude],
    )
    return { norm: this.norm(plan, first, inputs.first), step }
  }

  private norm({ e4m3 }: BatchPlan, first: Phase, out: number) {
    const { find, weights, overlap } = this.context
    const { weight, eps } = present(first.norm, 'a norm')
    const { address, width } = this.place(first.in)
    const kernel = find('norm.cu', e4m3 ? 'normRowEvens' : 'normRow')
    const launch = new KernelLaunch(kernel, NORM_KINDS)
    launch.setAll(address, 0, 0, weights.vector(weight), out, width, eps)
    launch.threads(Math.min(1024, Math.ceil(width / 8 / 32) * 32))
    return overlap ? launch.programmatic() : launch
  }

  private table(plan: BatchPlan, { tokens }: BatchVariant, inputs: BatchPlaces['inputs']): number {
    const { driver, weights, logits, layout, multiprocessors, state } = this.context
    const table = new BatchTable(plan, {
      blocks: multiprocessors,
      config: this.config,
      tokens,
      place: this.place,
      matrix: (names) => weights.joined(names),
      vector: (name) => weights.vector(name),
      logits,
      inputs,
      layerStride: layout.layerStride,
      kvMaps: { tile: this.kvMap(BOX_TOKENS.tile), warp: this.kvMap(BOX_TOKENS.warp) },
    })
    const mapBytes = table.maps.length * MAP_BYTES
    const bytes = mapBytes + table.bytes
    const staging = driver.allocateHost(bytes)
    table.maps.forEach((map, i) => driver.encodeTensorMap(staging + i * MAP_BYTES, map))
    const device = this.take(bytes)
    table.write(new DataView(viewMemory(staging, bytes), mapBytes), device)
    driver.copyToDevice(device, staging, bytes, state.stream)
    driver.synchronizeStream(state.stream)
    driver.freeHost(staging)
    return device + mapBytes
  }

  /** The whole reservation; the copy engine reads only boxes that the kernel asks for. */
  private kvMap(boxTokens: number) {
    const { kv, layout } = this.context
    const { headDim } = this.config
    const headBytes = headDim * 2
    const { tokenStride, slotBytes } = layout
    return {
      ...{ dataType: TENSOR_MAP.bfloat16, address: kv.address },
      dimensions: [
        ...[headDim, tokenStride / headBytes, Math.floor(slotBytes / tokenStride), kv.regions],
      ],
      ...{ strides: [headBytes, tokenStride, slotBytes], box: [64, 1, boxTokens, 1] },
      ...{ swizzle: TENSOR_MAP.swizzle128, l2Promotion: TENSOR_MAP.promotion256 },
    }
  }

  /** All that is not the model's lies in one block: small ones would have pages of their own. */
  private reserve(bytes: number): void {
    const whole = Math.ceil(bytes / PAGE_BYTES) * PAGE_BYTES
    this.blocks.push({ address: this.context.driver.allocate(whole), free: whole })
  }

  /** From the end of the last block. */
  private take(bytes: number): number {
    const block = present(this.blocks.at(-1), 'a block')
    block.free -= Math.ceil(bytes / ALIGNMENT) * ALIGNMENT
    assert(block.free >= 0, 'a block has room for all that is in it')
    return block.address + block.free
  }

  private filled(bytes: number, value: number): number {
    const { driver, state } = this.context
    const address = this.take(bytes)
    driver.fill8(address, value, bytes, state.stream)
    driver.synchronizeStream(state.stream)
    return address
  }
}
