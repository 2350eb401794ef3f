// Owns the CUDA backend as the engine sees it: a batch of segments becomes the rows of one step,
// tokens that are alone first, and logits come back to the host for those who sample there.

import { assert, present } from '../../assert.ts'
import { viewMemory } from '../../ffi/libc.ts'
import type { Model } from '../../model/model.ts'
import type { Backend, KvMemory, StepBatch } from '../backend.ts'
import type { CudaDevice } from './device.ts'
import { CudaForward, type ForwardOptions } from './forward.ts'
import type { SlotSampling } from './sampling.ts'

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

export class CudaBackend implements Backend {
  readonly vocab: number
  readonly stepTokensMax: number
  readonly chunkTokensMin = 1
  readonly kv: GpuKv
  readonly forward: CudaForward
  private readonly device: CudaDevice
  private readonly host: number
  private readonly rows: readonly Float32Array[]
  private outputs = 0
  private step = -1

  constructor(model: Model, options: CudaBackendOptions) {
    const { device, kv, maxSequences, stepTokens } = options
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

  /**
   * Says how the tokens of a slot's sequence are to be chosen on the GPU, from its next step on.
   * @throws LatticeError `invalid_request` for biases that cannot be
   */
  begin(slot: number, sampling: SlotSampling): void {
    this.forward.sampling.begin(slot, sampling, this.forward.stream)
  }

  /**
   * Queues a step whose tokens are chosen on the GPU. A token of -1 in the batch is the one that
   * was chosen last for its slot: the step can be queued before the host has seen that.
   * @returns the step's number, for `tokensOf`; up to PLACES − 2 may be under way
   */
  launchSampled(batch: StepBatch): number {
    const { stream } = this.forward
    this.kv.beforeStep(stream)
    const step = this.queue(batch, true)
    this.kv.afterStep(stream)
    return step
  }

  /**
   * Waits for a step: its tokens in the order of the segments that wanted one, -1 where none
   * could be chosen. Valid until PLACES − 1 more steps were queued.
   * @throws LatticeError `gpu_call_failed` if the GPU failed
   */
  tokensOf(step: number): Int32Array {
    const { state } = this.forward
    state.wait(step)
    return state.tokensOf(step)
  }

  launch(batch: StepBatch): void {
    const { logits, stream } = this.forward
    this.kv.beforeStep(stream)
    this.step = this.queue(batch, false)
    this.kv.afterStep(stream)
    const { driver } = this.device
    const bytes = this.outputs * this.vocab * 4
    if (bytes > 0) driver.copyToHost(this.host, logits, bytes, stream)
  }

  collect(): readonly Float32Array[] {
    assert(this.step >= 0, 'a step was launched')
    this.device.driver.synchronizeStream(this.forward.stream)
    return this.rows
  }

  close(): void {
    this.forward.close()
    this.kv.close()
    this.device.driver.freeHost(this.host)
  }

  /** Queues a batch's step; its outputs are in the order of the segments that want them. */
  private queue(batch: StepBatch, sample: boolean): number {
    const { segments, counts, wantsLogits } = batch
    let singles = 0
    let outputs = 0
    for (let s = 0; s < segments; s++) {
      if (counts[s] === 1) singles++
      if (wantsLogits[s]) outputs++
    }
    this.outputs = outputs
    const { forward } = this
    const decodes = singles === segments && outputs === segments
    this.fill(batch, singles)
    if (decodes) {
      const bucket = forward.bucketOf(segments)
      for (let i = segments; i < bucket; i++) forward.state.setRow(i, 0, 0, -1, i, 0)
      return forward.decode(segments)
    }
    const shape = { tokens: batch.tokenCount, outputs, singles, segments: segments - singles }
    return forward.step(shape, sample)
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
