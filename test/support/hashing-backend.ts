// Owns a backend whose steps write and read GPU memory by address, as attention does, and notice
// every byte that is not the sequence's own: on a mock GPU, where work waits as long as it may, or
// on a real one. Its logits are those of the null backend, so the same tokens are expected.

import assert from 'node:assert/strict'
import type { Backend, SlotSampling, StepBatch, TokenChooser } from '../../src/backends/backend.ts'
import { CudaDevice } from '../../src/backends/cuda/device.ts'
import { HostTier, type HostTierOptions } from '../../src/backends/cuda/host-tier.ts'
import { CudaKvMemory } from '../../src/backends/cuda/kv-memory.ts'
import { InlinePager, type Pager } from '../../src/backends/cuda/pager.ts'
import { nullLogits } from '../../src/backends/null/backend.ts'
import { extendHash } from '../../src/backends/null/kv-memory.ts'
import type { SamplingParams, TokenLogprobs } from '../../src/engine/api.ts'
import { Sampler, SamplerState } from '../../src/engine/sampler.ts'
import type { CudaDriver } from '../../src/ffi/cuda.ts'
import { tokenMajor } from '../../src/kv/layout.ts'
import { regionsFor } from '../../src/kv/regions.ts'
import type { MockCuda, Work } from './mock-cuda.ts'

export interface HashingOptions {
  vocab: number
  contextLength: number
  maxSequences: number
  stepTokens: number
  kvPages: number
  kv: { layers: number; rowBytes: number; pageBytes: number; shareColumns: number }
  /** Maps as late as it may. */
  latePager?: boolean
  /** Each step is followed by one that is still under way while the engine goes on. */
  overlap?: boolean
  idleReleaseMs?: number
  /** Where columns go. */
  tier?: HostTierOptions
  /** Chooses tokens itself, in steps that queue up. */
  chooses?: boolean
}

/** A GPU that steps run on. */
export interface Gpu {
  driver: CudaDriver
  pager: (device: CudaDevice) => Pager
  read(address: number, bytes: number, stream: number): Uint8Array<ArrayBuffer>
  write(address: number, data: Uint8Array, stream: number): void
  /** Later, or at once. */
  queue(stream: number, work: Work): void
}

export function mockGpu(cuda: MockCuda, latePager = false): Gpu {
  return {
    driver: cuda,
    pager: (device) => new InlinePager(device, latePager),
    read: (address, bytes) => cuda.read(address, bytes),
    write: (address, data) => cuda.write(address, data),
    queue: (stream, work) => cuda.queue(stream, work),
  }
}

/** Bytes at each end of a token's row that are written and checked. */
const SAMPLE_BYTES = 80

export class HashingBackend implements Backend {
  readonly vocab: number
  readonly stepTokensMax: number
  readonly chunkTokensMin = 1
  readonly kv: CudaKvMemory
  private readonly gpu: Gpu
  private readonly device: CudaDevice
  private readonly stream: number
  private readonly rows: Float32Array[]
  private readonly overlap: boolean
  private touched: { address: number; bytes: number }[] = []
  readonly chooser?: HashingChooser

  constructor(gpu: Gpu, options: HashingOptions) {
    const { vocab, contextLength, maxSequences, stepTokens, kvPages, kv } = options
    this.gpu = gpu
    this.vocab = vocab
    this.stepTokensMax = stepTokens
    this.device = CudaDevice.open(0, gpu.driver)
    const layout = tokenMajor({ ...kv, maxTokens: contextLength })
    this.kv = new CudaKvMemory(this.device, layout, gpu.pager(this.device), {
      slots: maxSequences,
      regions: regionsFor(maxSequences),
      limitPages: kvPages,
      idleReleaseMs: options.idleReleaseMs ?? 0,
    })
    if (options.tier) this.kv.tier = new HostTier(this.device, this.kv, options.tier)
    this.stream = gpu.driver.createStream()
    this.rows = Array.from({ length: maxSequences }, () => new Float32Array(vocab))
    this.overlap = options.overlap ?? false
    if (options.chooses) this.chooser = new HashingChooser(this, gpu, this.stream)
  }

  launch(batch: StepBatch): void {
    this.queue(batch)
  }

  /** @param choose takes the logits of a slot's sequence, when they are there */
  queue(batch: StepBatch, choose?: Choose): void {
    this.kv.beforeStep(this.stream)
    this.touched = []
    let token = 0
    let row = 0
    for (let s = 0; s < batch.segments; s++) {
      const start = batch.starts[s] ?? 0
      const count = batch.counts[s] ?? 0
      const slot = batch.slots[s] ?? 0
      const address = this.kv.slotAddress(slot)
      const tokens = batch.tokens.slice(token, token + count)
      const logits = batch.wantsLogits[s] ? this.rows[row++] : undefined
      token += count
      const touches = [{ address, bytes: (start + count) * this.kv.layout.tokenStride }]
      this.touched.push(...touches)
      const run = (): void => {
        if (tokens[0] === -1) tokens[0] = this.chooser?.last[slot] ?? -1
        const hash = this.attend(address, start, tokens)
        if (!logits) return
        nullLogits(hash, logits)
        choose?.(slot, logits)
      }
      this.gpu.queue(this.stream, { name: 'step', touches, run })
    }
    this.kv.afterStep(this.stream)
  }

  collect(): readonly Float32Array[] {
    this.gpu.driver.synchronizeStream(this.stream)
    if (this.overlap) {
      const work = { name: 'next step', touches: this.touched, run: (): void => {} }
      this.gpu.queue(this.stream, work)
      this.kv.afterStep(this.stream)
    }
    return this.rows
  }

  close(): void {
    this.kv.close()
    this.gpu.driver.destroyStream(this.stream)
    this.device.close()
  }

  /** Reads all tokens before `start`, writes those from there on. @returns the last one's hash */
  private attend(address: number, start: number, tokens: Int32Array): number {
    const { tokenStride } = this.kv.layout
    const last = tokenStride - SAMPLE_BYTES
    let hash = 0
    for (let position = 0; position < start; position++) {
      const row = address + position * tokenStride
      const words = [row, row + last].flatMap((at) => [
        ...new Uint32Array(this.gpu.read(at, SAMPLE_BYTES, this.stream).buffer),
      ])
      hash = words[0] ?? 0
      assert.ok(
        words.every((word) => word === hash),
        `position ${position} of ${start} is whole`,
      )
    }
    for (const [i, token] of tokens.entries()) {
      hash = extendHash(hash, token)
      const sample = new Uint8Array(new Uint32Array(SAMPLE_BYTES / 4).fill(hash).buffer)
      const row = address + (start + i) * tokenStride
      this.gpu.write(row, sample, this.stream)
      this.gpu.write(row + last, sample, this.stream)
    }
    return hash
  }
}

type Choose = (slot: number, logits: Float32Array) => void

/** Chooses tokens when a step runs, as late as anybody asks for one. */
class HashingChooser implements TokenChooser {
  /** By slot. */
  readonly last: number[] = []
  private readonly backend: HashingBackend
  private readonly gpu: Gpu
  private readonly stream: number
  private readonly sampler: Sampler
  private readonly states: (SamplerState | undefined)[] = []
  private readonly tops: (number | undefined)[] = []
  private readonly steps = new Map<number, { tokens: number[]; event: number }>()
  /** Of the last two steps. */
  private readonly logprobs = new Map<number, (TokenLogprobs | undefined)[]>()
  private launched = 0

  constructor(backend: HashingBackend, gpu: Gpu, stream: number) {
    this.backend = backend
    this.gpu = gpu
    this.stream = stream
    this.sampler = new Sampler(backend.vocab)
  }

  /** Others are the host's, so that both kinds meet in a step. */
  takes({ seed }: SamplingParams): boolean {
    return seed % 5 !== 4
  }

  begin(slot: number, { params, prompt, output, topLogprobs }: SlotSampling): void {
    const run = (): void => {
      const state = new SamplerState(params, prompt)
      for (const token of output) {
        if (params.temperature > 0) state.random.uniform()
        state.accept(token)
      }
      this.states[slot] = state
      this.tops[slot] = topLogprobs
    }
    this.gpu.queue(this.stream, { name: 'begin', touches: [], run })
  }

  launchChoosing(batch: StepBatch): number {
    const tokens: number[] = []
    const logprobs: (TokenLogprobs | undefined)[] = []
    this.backend.queue(batch, (slot, logits) => {
      const state = this.states[slot]
      const token = state ? this.sampler.sample(logits, state) : 0
      state?.accept(token)
      this.last[slot] = token
      tokens.push(token)
      const top = this.tops[slot]
      logprobs.push(top === undefined ? top : this.sampler.logprobs(logits, token, top))
    })
    const event = this.gpu.driver.createEvent()
    this.gpu.driver.recordEvent(event, this.stream)
    this.steps.set(this.launched, { tokens, event })
    this.logprobs.delete(this.launched - 2)
    this.logprobs.set(this.launched, logprobs)
    return this.launched++
  }

  tokensOf(step: number): Int32Array {
    const found = this.steps.get(step)
    assert.ok(found, `step ${step} is asked for once, in time`)
    this.gpu.driver.synchronizeEvent(found.event)
    this.gpu.driver.destroyEvent(found.event)
    this.steps.delete(step)
    return Int32Array.from(found.tokens)
  }

  logprobsOf(step: number, output: number): TokenLogprobs {
    const found = this.logprobs.get(step)?.[output]
    assert.ok(found, 'log-probabilities are asked for in time, by whoever wants them')
    return found
  }
}
