// Owns the CUDA backend as the engine sees it: a batch of segments becomes the rows of one step,
// tokens that are alone first, and logits come back to the host for those who sample there.

import { present } from '../../assert.ts'
import { LatticeError } from '../../errors.ts'
import { viewMemory } from '../../ffi/libc.ts'
import type { Model } from '../../model/model.ts'
import type { SamplingParams, TokenLogprobs } from '../../engine/api.ts'
import type { Backend, KvMemory, SlotSampling, StepBatch, TokenChooser } from '../backend.ts'
import type { CudaDevice } from './device.ts'
import { MAX_TOP_LOGPROBS } from '../../limits.ts'
import { CudaForward, type ForwardOptions } from './forward.ts'

/** Rows of a launch, where they are not its first dimension. */
const STEP_TOKENS_MOST = 65_535

/** KV memory as CudaKvMemory keeps it. */
export interface GpuKv extends KvMemory {
  /** Of region 0; region r lies r × slotBytes further. */
  readonly address: number
  /** Where a slot's sequence writes and reads now. */
  regionOf(slot: number): number
  /** Queues what a step needs before it; says that the step is queued. */
  beforeStep(stream: number): void
  afterStep(stream: number): void
  close(): void
}

export interface CudaBackendOptions extends Omit<ForwardOptions, 'kv'> {
  /** Memory of a token-major layout for as many slots; the backend closes it. */
  kv: GpuKv
}

export class CudaBackend implements Backend, TokenChooser {
  readonly vocab: number
  readonly stepTokensMax: number
  readonly chunkTokensMin = 1
  readonly kv: GpuKv
  readonly chooser = this
  readonly forward: CudaForward
  private readonly device: CudaDevice
  private readonly host: number
  private readonly rows: readonly Float32Array[]

  /** @throws LatticeError `usage` for steps of too many tokens, and what CudaForward does */
  constructor(model: Model, options: CudaBackendOptions) {
    const { device, kv, maxSequences, stepTokens } = options
    if (stepTokens > STEP_TOKENS_MOST) {
      throw new LatticeError('usage', `A GPU takes no steps of ${stepTokens} tokens.`, {
        todo: `Give --step-tokens ${STEP_TOKENS_MOST} or fewer.`,
      })
    }
    this.device = device
    this.kv = kv
    this.vocab = model.config.vocab
    this.stepTokensMax = stepTokens
    this.forward = new CudaForward(model, { ...options, kv })
    const bytes = maxSequences * this.vocab * 4
    this.host = device.driver.allocateHost(bytes)
    const view = viewMemory(this.host, bytes)
    this.rows = Array.from(
      { length: maxSequences },
      (_, i) => new Float32Array(view, i * this.vocab * 4, this.vocab),
    )
  }

  takes(params: SamplingParams, topLogprobs = 0): boolean {
    return topLogprobs <= MAX_TOP_LOGPROBS && this.forward.sampling.takes(params)
  }

  begin(slot: number, sampling: SlotSampling): void {
    this.forward.sampling.begin(slot, sampling, this.forward.stream)
  }

  launchChoosing(batch: StepBatch, logits: boolean): number {
    return this.queue(batch, true, logits)
  }

  tokensOf(step: number): Int32Array {
    const { state } = this.forward
    state.wait(step)
    return state.tokensOf(step)
  }

  logprobsOf(step: number, output: number, top: number): TokenLogprobs {
    return this.forward.logprobs.of(step, output, Math.min(top, this.vocab))
  }

  launch(batch: StepBatch): void {
    this.queue(batch, false, true)
  }

  collect(): readonly Float32Array[] {
    this.device.driver.synchronizeStream(this.forward.stream)
    return this.rows
  }

  close(): void {
    this.forward.close()
    this.kv.close()
    this.device.driver.freeHost(this.host)
  }

  /** Queues a batch's step; its outputs are in the order of the segments that want them. */
  private queue(batch: StepBatch, sample: boolean, toHost: boolean): number {
    const { segments, counts, wantsLogits } = batch
    let singles = 0
    let outputs = 0
    for (let s = 0; s < segments; s++) {
      if (counts[s] === 1) singles++
      if (wantsLogits[s]) outputs++
    }
    const { forward, kv } = this
    const { logits, stream } = forward
    kv.beforeStep(stream)
    this.fill(batch, singles)
    const shape = { tokens: batch.tokenCount, outputs, singles, segments: segments - singles }
    const decodes = singles === segments && outputs === segments
    const step = decodes ? this.decode(segments) : forward.step(shape, sample)
    kv.afterStep(stream)
    const bytes = outputs * this.vocab * 4
    if (toHost && bytes > 0) this.device.driver.copyToHost(this.host, logits, bytes, stream)
    return step
  }

  private decode(rows: number): number {
    const { forward } = this
    const bucket = forward.bucketOf(rows)
    for (let i = rows; i < bucket; i++) forward.state.setRow(i, 0, 0, -1, i, 0)
    return forward.decode(rows)
  }

  private fill(batch: StepBatch, singles: number): void {
    const { state } = this.forward
    let single = 0
    let row = singles
    let segment = 0
    let output = 0
    let from = 0
    for (let s = 0; s < batch.segments; s++) {
      const count = present(batch.counts[s], 'a count')
      const slot = present(batch.slots[s], 'a slot')
      const start = present(batch.starts[s], 'a position')
      const wanted = batch.wantsLogits[s] ? output++ : -1
      const region = this.kv.regionOf(slot)
      const first = count === 1 ? single++ : row
      if (count > 1) {
        state.setSegment(segment++, row, start, count, region)
        row += count
      }
      for (let t = 0; t < count; t++) {
        const token = present(batch.tokens[from++], 'a token')
        const output = t === count - 1 ? wanted : -1
        state.setRow(first + t, token, start + t, slot, output, region)
      }
    }
  }
}
