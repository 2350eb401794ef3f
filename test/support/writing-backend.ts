// Owns a backend that computes nothing but writes to real host memory: each token's rows of keys
// and values, in every layer, where a computing backend would write them.

import type { Backend, StepBatch } from '../../src/backends/backend.ts'
import { HOST_PAGE_BYTES, HostKvMemory } from '../../src/backends/cpu/kv-memory.ts'
import { viewMemory } from '../../src/ffi/libc.ts'
import { layerMajor } from '../../src/kv/layout.ts'

export interface WritingOptions {
  layers: number
  rowBytes: number
  contextLength: number
  maxSequences: number
  stepTokens: number
}

export class WritingBackend implements Backend {
  readonly vocab = 8
  readonly stepTokensMax: number
  readonly chunkTokensMin = 1
  readonly kv: HostKvMemory
  private readonly memory: Uint8Array
  private readonly rows: Float32Array[]

  constructor(options: WritingOptions) {
    const { layers, rowBytes, contextLength, maxSequences, stepTokens } = options
    this.stepTokensMax = stepTokens
    const shape = { layers, rowBytes, maxTokens: contextLength, pageBytes: HOST_PAGE_BYTES }
    this.kv = new HostKvMemory(layerMajor(shape), maxSequences)
    const bytes = this.kv.layout.slotBytes * maxSequences
    this.memory = new Uint8Array(viewMemory(this.kv.address, bytes))
    this.rows = Array.from({ length: maxSequences }, () => new Float32Array(this.vocab))
  }

  launch(batch: StepBatch): void {
    for (let s = 0; s < batch.segments; s++) {
      this.write(batch.slots[s] ?? 0, batch.starts[s] ?? 0, batch.counts[s] ?? 0)
    }
  }

  collect(): readonly Float32Array[] {
    return this.rows
  }

  close(): void {
    this.kv.close()
  }

  /** Writes `count` tokens from position `start` on. */
  write(slot: number, start: number, count: number): void {
    const { shape, slotBytes, layerStride, tokenStride } = this.kv.layout
    for (let layer = 0; layer < shape.layers; layer++) {
      const from = slot * slotBytes + layer * layerStride + start * tokenStride
      this.memory.fill(slot + 1, from, from + count * tokenStride)
    }
  }

  /** Whether a token's rows hold what `write` wrote for this slot, or are zero if `slot` is -1. */
  holds(slot: number, position: number, writer = slot): boolean {
    const { shape, slotBytes, layerStride, tokenStride } = this.kv.layout
    for (let layer = 0; layer < shape.layers; layer++) {
      const from = slot * slotBytes + layer * layerStride + position * tokenStride
      const row = this.memory.subarray(from, from + tokenStride)
      if (row.some((byte) => byte !== writer + 1)) return false
    }
    return true
  }
}
