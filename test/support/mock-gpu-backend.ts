// Owns a backend whose kernels run on a mock GPU: they read and write a sequence's memory by address
// as attention does, and notice every byte that is not the sequence's own. Its logits are those of
// the null backend, so the same tokens are expected.

import assert from 'node:assert/strict'
import type { Backend, StepBatch } from '../../src/backends/backend.ts'
import { CudaDevice } from '../../src/backends/cuda/device.ts'
import { CudaKvMemory } from '../../src/backends/cuda/kv-memory.ts'
import { InlinePager } from '../../src/backends/cuda/pager.ts'
import { nullLogits } from '../../src/backends/null/backend.ts'
import { extendHash } from '../../src/backends/null/kv-memory.ts'
import { tokenMajor } from '../../src/kv/layout.ts'
import { regionsFor } from '../../src/kv/regions.ts'
import { MockCuda } from './mock-cuda.ts'

export interface MockGpuOptions {
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
}

export class MockGpuBackend implements Backend {
  readonly vocab: number
  readonly stepTokensMax: number
  readonly chunkTokensMin = 1
  readonly cuda: MockCuda
  readonly kv: CudaKvMemory
  private readonly device: CudaDevice
  private readonly stream: number
  private readonly rows: Float32Array[]
  private readonly overlap: boolean
  private touched: { address: number; bytes: number }[] = []

  constructor(options: MockGpuOptions) {
    const { vocab, contextLength, maxSequences, stepTokens, kvPages, kv } = options
    this.vocab = vocab
    this.stepTokensMax = stepTokens
    // The scratch memory for taking frames apart is beside the limit.
    const totalBytes = (kvPages + kv.shareColumns) * kv.pageBytes
    this.cuda = new MockCuda({ pageBytes: kv.pageBytes, totalBytes })
    this.device = CudaDevice.open(0, this.cuda)
    const pager = new InlinePager(this.device, options.latePager)
    this.kv = new CudaKvMemory(
      this.device,
      tokenMajor({ ...kv, maxTokens: contextLength }),
      pager,
      {
        slots: maxSequences,
        regions: regionsFor(maxSequences),
        limitPages: kvPages,
        idleReleaseMs: options.idleReleaseMs ?? 0,
      },
    )
    this.stream = this.cuda.createStream()
    this.rows = Array.from({ length: maxSequences }, () => new Float32Array(vocab))
    this.overlap = options.overlap ?? false
  }

  launch(batch: StepBatch): void {
    this.kv.beforeStep(this.stream)
    this.touched = []
    let token = 0
    let row = 0
    for (let s = 0; s < batch.segments; s++) {
      const [slot, start, count] = [batch.slots[s] ?? 0, batch.starts[s] ?? 0, batch.counts[s] ?? 0]
      const address = this.kv.slotAddress(slot)
      const bytes = (start + count) * this.kv.layout.tokenStride
      const tokens = batch.tokens.slice(token, token + count)
      const logits = batch.wantsLogits[s] ? this.rows[row++] : undefined
      token += count
      const touches = [{ address, bytes }]
      this.touched.push(...touches)
      const run = (): void => {
        const hash = this.attend(address, start, tokens)
        if (logits) nullLogits(hash, logits)
      }
      this.cuda.queue(this.stream, { name: 'step', touches, run })
    }
    this.kv.afterStep(this.stream)
  }

  collect(): readonly Float32Array[] {
    this.cuda.synchronizeStream(this.stream)
    if (this.overlap) {
      this.cuda.queue(this.stream, { name: 'next step', touches: this.touched, run: () => {} })
      this.kv.afterStep(this.stream)
    }
    return this.rows
  }

  close(): void {
    this.kv.close()
    this.cuda.destroyStream(this.stream)
    this.device.close()
  }

  /** Reads all tokens before `start` and writes those from there on. @returns the last one's hash */
  private attend(address: number, start: number, tokens: Int32Array): number {
    const { tokenStride } = this.kv.layout
    let hash = 0
    for (let position = 0; position < start; position++) {
      const words = new Uint32Array(
        this.cuda.read(address + position * tokenStride, tokenStride).buffer,
      )
      hash = words[0] ?? 0
      assert.ok(
        words.every((word) => word === hash),
        `position ${position} of ${start} is whole`,
      )
    }
    for (const [i, token] of tokens.entries()) {
      hash = extendHash(hash, token)
      const row = new Uint8Array(new Uint32Array(tokenStride / 4).fill(hash).buffer)
      this.cuda.write(address + (start + i) * tokenStride, row)
    }
    return hash
  }
}
