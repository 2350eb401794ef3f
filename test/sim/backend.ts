// Owns the simulated device: it takes a step at launch, reads and answers at collect, and until
// then holds on to every page that the step reads. It fails when told to.

import { present } from '../../src/assert.ts'
import { LatticeError } from '../../src/errors.ts'
import { nullLogits } from '../../src/backends/null/backend.ts'
import type { Backend, StepBatch } from '../../src/backends/backend.ts'
import type { SimConfig } from './config.ts'
import type { SimMemory } from './memory.ts'

export class SimBackend implements Backend {
  readonly vocab: number
  readonly stepTokensMax: number
  readonly chunkTokensMin: number
  readonly kv: SimMemory
  /** Called at launch: who is in which slot is known from now on. */
  onLaunch: () => void = () => {}
  /** Called when a slot's tokens have been read. */
  onRead: (slot: number, tokens: number, digest: number) => void = () => {}
  /** What goes wrong in the next step. */
  fault: 'launch' | 'collect' | 'nan' | undefined
  /** What the step in flight reads is not what was there. */
  blind = false
  private readonly rows: Float32Array[]
  private batch: StepBatch | undefined

  constructor(config: SimConfig, kv: SimMemory) {
    this.vocab = config.vocab
    this.stepTokensMax = config.stepTokens
    this.chunkTokensMin = config.chunkTokensMin
    this.kv = kv
    this.rows = Array.from({ length: config.maxSequences }, () => new Float32Array(config.vocab))
  }

  launch(batch: StepBatch): void {
    this.fail('launch')
    this.onLaunch()
    let token = 0
    for (let s = 0; s < batch.segments; s++) {
      const slot = batch.slots[s] ?? 0
      const start = batch.starts[s] ?? 0
      const end = start + (batch.counts[s] ?? 0)
      for (let t = start; t < end; t++) this.kv.append(slot, t, batch.tokens[token++] ?? 0)
      this.kv.beginReading(slot, end)
    }
    this.batch = batch
  }

  collect(): readonly Float32Array[] {
    this.fail('collect')
    const batch = present(this.batch, 'a launched step')
    let row = 0
    for (let s = 0; s < batch.segments; s++) {
      const slot = batch.slots[s] ?? 0
      const tokens = (batch.starts[s] ?? 0) + (batch.counts[s] ?? 0)
      const digest = this.kv.digest(slot, tokens)
      if (!batch.wantsLogits[s]) continue
      if (!this.blind) this.onRead(slot, tokens, digest)
      nullLogits(this.blind ? ~digest : digest, present(this.rows[row++], 'a row of logits'))
    }
    this.fence()
    if (this.fault === 'nan') for (let r = 0; r < row; r++) this.rows[r]?.fill(Number.NaN)
    return this.rows
  }

  close(): void {}

  /** The step has read all that it reads. */
  protected fence(): void {
    this.kv.endReading()
  }

  private fail(what: SimBackend['fault']): void {
    if (this.fault === what) throw new LatticeError('backend_failed', `injected at ${what}`)
  }
}
