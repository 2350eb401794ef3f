// Owns the simulated device: it takes a step at launch, reads and answers at collect, and until
// then holds on to every page that the step reads. Or it chooses tokens itself, as a GPU does: then
// what is done to memory after a launch comes after the step. It fails when told to.

import { present } from '../../src/assert.ts'
import { LatticeError } from '../../src/errors.ts'
import { nullLogits } from '../../src/backends/null/backend.ts'
import { NullChooser } from '../../src/backends/null/chooser.ts'
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
  /** Called when a slot's tokens have been read; what it returns, when the step is over. */
  onRead: (slot: number, tokens: number, digest: number) => () => void = () => () => {}
  /** What goes wrong in the next step. */
  fault: 'launch' | 'collect' | 'nan' | undefined
  /** What the step in flight reads is not what was there. */
  blind = false
  readonly chooser?: SimChooser
  private readonly rows: Float32Array[]
  private batch: StepBatch | undefined
  /** Of the GPU's, the one launched last. */
  step = -1

  constructor(config: SimConfig, kv: SimMemory) {
    this.vocab = config.vocab
    this.stepTokensMax = config.stepTokens
    this.chunkTokensMin = config.chunkTokensMin
    this.kv = kv
    this.rows = Array.from({ length: config.maxSequences }, () => new Float32Array(config.vocab))
    if (config.ahead) this.chooser = new SimChooser(this)
  }

  launch(batch: StepBatch): void {
    this.fail('launch')
    this.onLaunch()
    let token = 0
    const touched: { slot: number; tokens: number }[] = []
    for (let s = 0; s < batch.segments; s++) {
      const slot = batch.slots[s] ?? 0
      const start = batch.starts[s] ?? 0
      const end = start + (batch.counts[s] ?? 0)
      for (let t = start; t < end; t++) {
        const next = batch.tokens[token++] ?? 0
        this.kv.append(slot, t, this.chooser?.known(slot, next) ?? next)
      }
      this.kv.beginReading(slot, end)
      touched.push({ slot, tokens: end })
    }
    this.batch = batch
    this.step = this.kv.shadow?.launch(touched) ?? -1
  }

  collect(): readonly Float32Array[] {
    this.fail('collect')
    if (this.chooser) {
      if (this.fault === 'nan') for (const row of this.rows) row.fill(Number.NaN)
      return this.rows
    }
    this.kv.shadow?.wait(this.step)
    this.read((right) => right())
    if (this.fault === 'nan') for (const row of this.rows) row.fill(Number.NaN)
    return this.rows
  }

  /** Reads what the step reads and fills its rows. @param reading takes what checks each slot */
  read(reading: (check: () => void, slot: number, row: Float32Array) => void): void {
    const batch = present(this.batch, 'a launched step')
    let rows = 0
    for (let s = 0; s < batch.segments; s++) {
      const slot = batch.slots[s] ?? 0
      const tokens = (batch.starts[s] ?? 0) + (batch.counts[s] ?? 0)
      const digest = this.kv.digest(slot, tokens)
      if (!batch.wantsLogits[s]) continue
      const row = present(this.rows[rows++], 'a row of logits')
      nullLogits(this.blind ? ~digest : digest, row)
      reading(this.blind ? () => {} : this.onRead(slot, tokens, digest), slot, row)
    }
    this.fence()
  }

  close(): void {}

  /** The step has read all that it reads. */
  protected fence(): void {
    this.kv.endReading()
  }

  fail(what: SimBackend['fault']): void {
    if (this.fault === what) throw new LatticeError('backend_failed', `injected at ${what}`)
  }
}

/** Says at a step's end what was read in it, when the tokens before it have been told. */
class SimChooser extends NullChooser {
  private readonly backend: SimBackend
  private readonly checks = new Map<number, (() => void)[]>()
  /** By step, which one it is on the GPU. */
  private readonly shadowSteps = new Map<number, number>()
  private reading: (() => void)[] = []

  constructor(backend: SimBackend) {
    super(backend.vocab, (batch, choose) => {
      backend.launch(batch)
      backend.read((check, slot, row) => {
        this.reading.push(check)
        choose(slot, row)
      })
    })
    this.backend = backend
  }

  override launchChoosing(batch: StepBatch, logits: boolean): number {
    this.reading = []
    const step = super.launchChoosing(batch, logits)
    this.checks.set(step, this.reading)
    this.shadowSteps.set(step, this.backend.step)
    return step
  }

  override tokensOf(step: number): Int32Array {
    this.backend.fail('collect')
    this.backend.kv.shadow?.wait(this.shadowSteps.get(step) ?? -1)
    this.shadowSteps.delete(step)
    const tokens = super.tokensOf(step)
    if (this.backend.fault === 'nan') return tokens.fill(-1)
    for (const check of this.checks.get(step) ?? []) check()
    this.checks.delete(step)
    return tokens
  }
}
