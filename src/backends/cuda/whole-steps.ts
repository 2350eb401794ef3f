// Owns decode steps of few tokens as one cooperative kernel: its table of phases on the device, its
// counters and scratch, and its launches. Which models it takes is decode-step.ts's to say.

import { assert, present } from '../../assert.ts'
import { FUNCTION } from '../../ffi/cuda.ts'
import { type ArgumentKind, KernelLaunch } from '../../ffi/kernel-launch.ts'
import { viewMemory } from '../../ffi/libc.ts'
import type { ModelConfig } from '../../model/model.ts'
import type { Value } from '../../model/program.ts'
import {
  PHASE,
  type Phase,
  planStep,
  stepShape,
  stepVariant,
  type Unplanned,
} from './decode-step.ts'
import { fuseSkinny, type Node } from './fuse.ts'
import type { LowerContext } from './lower-context.ts'

const KINDS: readonly ArgumentKind[] = [
  ...(['u64', 'i32', 'u64', 'u64', 'u64', 'u64', 'u64', 'f32', 'u64', 'u64'] as const),
  ...(['u64', 'i32', 'i32', 'f32'] as const),
]

/** sizeof(Phase) in phases.cuh. */
const PHASE_BYTES = 80
const NO_WINDOW = 0x7fffffff

type Place = { address: number; stride: number; width: number }

export class WholeSteps {
  /** By number of tokens, why there is no such kernel. */
  readonly reasons: (string | undefined)[] = []
  private readonly context: LowerContext
  private readonly config: ModelConfig
  private readonly place: (value: Value) => Place
  private readonly plan: readonly Phase[] | Unplanned
  private readonly allocations: number[] = []

  constructor(
    context: LowerContext,
    config: ModelConfig,
    nodes: readonly Node[],
    place: (value: Value) => Place,
  ) {
    this.context = context
    this.config = config
    this.place = place
    this.plan = context.wholeSteps ? planStep(fuseSkinny(nodes)) : { reason: 'it is switched off' }
  }

  /**
   * Compiles, or finds compiled, what does all that follows the embedding.
   * @returns undefined where `reasons` has one
   */
  launch(tokens: number): KernelLaunch | undefined {
    const made = 'reason' in this.plan ? this.plan : this.make(this.plan, tokens)
    if (!('reason' in made)) return made
    this.reasons[tokens] = made.reason
    return undefined
  }

  /** Nothing that was launched may still be running. */
  close(): void {
    for (const address of this.allocations) this.context.driver.free(address)
  }

  private make(plan: readonly Phase[], tokens: number): KernelLaunch | Unplanned {
    const { driver, find, multiprocessors, sharedBytes, state, layout, weights } = this.context
    const shape = stepShape(plan, this.config, (names) => weights.joined(names).k)
    const variant = stepVariant(shape, tokens, multiprocessors, sharedBytes)
    if ('reason' in variant) return variant
    const kernel = find('decode-step.cu', 'decodeStep', variant.defines)
    driver.setFunctionAttribute(kernel, FUNCTION.dynamicSharedBytesMax, variant.sharedBytes)
    if (driver.blocksPerMultiprocessor(kernel, variant.threads, variant.sharedBytes) < 1) {
      return { reason: 'a multiprocessor has no room for its block' }
    }
    const { positions, lengths: seen, bases } = state.rows.tokens
    const heads = tokens * this.config.kvHeads
    const counters = this.zeros(4 * (4 + 4 * plan.length + heads))
    const partial = this.zeros(variant.partialFloats * 4)
    const launch = new KernelLaunch(kernel, KINDS).cooperative()
    if (this.context.overlap) launch.programmatic()
    launch.grid(multiprocessors).threads(variant.threads).sharedBytes(variant.sharedBytes)
    const ropes = plan.flatMap((phase) => phase.rope ?? [])
    const rope = present(ropes[0], 'a rotation')
    const turn = this.context.ropeTable(rope)
    return launch.setAll(
      ...[this.table(plan, heads), plan.length, counters, positions, seen, bases],
      ...[layout.tokenStride, this.config.attentionScale, partial],
      ...[counters + 4 * (4 + 4 * plan.length), turn.address, rope.dimensions],
      ...[rope.pairing === 'interleaved' ? 1 : 0, turn.magnitude],
    )
  }

  /** @param heads blocks that finish an attention phase */
  private table(plan: readonly Phase[], heads: number): number {
    const { driver, state, weights, logits, layout, multiprocessors } = this.context
    const bytes = plan.length * PHASE_BYTES
    const staging = driver.allocateHost(bytes)
    const view = new DataView(viewMemory(staging, bytes))
    plan.forEach((phase, i) => {
      const at = i * PHASE_BYTES
      const matrix =
        phase.kind === 'attention' ? { address: 0, rows: 0, k: 0 } : weights.joined(phase.weights)
      const out =
        phase.kind === 'logits'
          ? { address: logits, stride: matrix.rows }
          : this.place(present(phase.out, 'what a phase makes'))
      const from = this.place(phase.in)
      assert(matrix.k === 0 || from.stride === matrix.k, 'inputs of a phase have no gaps')
      const before = plan[i - 1]?.kind
      const addresses = [
        ...[matrix.address, from.address, weights.vector(phase.norm?.weight)],
        ...[out.address, phase.layer * layout.layerStride],
      ]
      addresses.forEach((value, j) => view.setBigUint64(at + j * 8, BigInt(value), true))
      const integers = [
        ...[PHASE[phase.kind], matrix.rows, matrix.k, out.stride, phase.gelu ? 1 : 0],
        ...[phase.rope?.dimensions ?? 0, phase.rope?.pairing === 'interleaved' ? 1 : 0],
      ]
      integers.forEach((value, j) => view.setInt32(at + 40 + j * 4, value, true))
      view.setFloat32(at + 68, phase.norm?.eps ?? 0, true)
      view.setInt32(at + 72, phase.window ?? NO_WINDOW, true)
      view.setUint32(at + 76, before === 'attention' ? heads : multiprocessors, true)
    })
    const table = driver.allocate(bytes)
    this.allocations.push(table)
    driver.copyToDevice(table, staging, bytes, state.stream)
    driver.synchronizeStream(state.stream)
    driver.freeHost(staging)
    return table
  }

  private zeros(bytes: number): number {
    const { driver, state } = this.context
    const address = driver.allocate(bytes)
    this.allocations.push(address)
    driver.fill8(address, 0, bytes, state.stream)
    driver.synchronizeStream(state.stream)
    return address
  }
}
