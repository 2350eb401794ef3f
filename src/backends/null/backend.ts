// Owns a backend that computes nothing: its logits are a hash of the tokens that the sequence's
// slot holds, so that a wrong slot, position or page shows as a wrong token or as an error at once.
// It runs in tests, and can fail on purpose.

import { present } from '../../assert.ts'
import { LatticeError } from '../../errors.ts'
import { layerMajor } from '../../kv/layout.ts'
import { regionsFor } from '../../kv/regions.ts'
import type { Backend, StepBatch } from '../backend.ts'
import { NullChooser } from './chooser.ts'
import { NullKvMemory } from './kv-memory.ts'
import { NullTier } from './tier.ts'

export interface NullBackendOptions {
  vocab: number
  contextLength: number
  maxSequences: number
  stepTokens: number
  /** Two layers and 16 tokens a page unless told. */
  kv?: { layers: number; rowBytes: number; pageBytes: number }
  /** How long a step seems to compute. */
  stepMs?: number
  fault?: NullFault
  /** Columns that a tier holds; none unless told. */
  tierColumns?: number
  /** Chooses tokens itself, as a GPU does, so that steps are queued ahead. */
  ahead?: boolean
}

/** What goes wrong in step `atStep` (the first is 0). */
export interface NullFault {
  atStep: number
  /**
   * throw: the backend says that it failed; crash: it throws what nobody foresaw; exit: the
   * thread ends on the spot; nan: the first row of logits is not a number.
   */
  kind: 'throw' | 'crash' | 'exit' | 'nan'
}

const KV_DEFAULT = { layers: 2, rowBytes: 256, pageBytes: 4096 }

export class NullBackend implements Backend {
  readonly vocab: number
  readonly stepTokensMax: number
  readonly chunkTokensMin = 1
  readonly kv: NullKvMemory
  private readonly options: NullBackendOptions
  private readonly rows: Float32Array[]
  private readonly sleeper = new Int32Array(new SharedArrayBuffer(4))
  readonly chooser?: NullChooser
  private steps = 0

  constructor(options: NullBackendOptions) {
    const { vocab, contextLength, maxSequences, stepTokens, kv = KV_DEFAULT } = options
    this.options = options
    this.vocab = vocab
    this.stepTokensMax = stepTokens
    const layout = layerMajor({ ...kv, maxTokens: contextLength })
    this.kv = new NullKvMemory(layout, maxSequences, regionsFor(maxSequences))
    const { tierColumns: capacity } = options
    if (capacity) this.kv.tier = new NullTier(this.kv, { capacity })
    this.rows = Array.from({ length: maxSequences }, () => new Float32Array(vocab))
    if (options.ahead) {
      this.chooser = new NullChooser(vocab, (batch, choose) => {
        this.launch(batch)
        // Whatever follows is queued behind the step.
        this.kv.endReading()
        let row = 0
        for (let s = 0; s < batch.segments; s++) {
          if (batch.wantsLogits[s]) choose(batch.slots[s] ?? 0, present(this.rows[row++], 'a row'))
        }
      })
    }
  }

  launch(batch: StepBatch): void {
    let token = 0
    let row = 0
    for (let s = 0; s < batch.segments; s++) {
      const slot = batch.slots[s] ?? 0
      let position = batch.starts[s] ?? 0
      for (const end = position + (batch.counts[s] ?? 0); position < end; position++) {
        const next = batch.tokens[token++] ?? 0
        this.kv.append(slot, position, this.chooser?.known(slot, next) ?? next)
      }
      this.kv.beginReading(slot, position)
      if (!batch.wantsLogits[s]) continue
      nullLogits(this.kv.hashAt(slot, position - 1), present(this.rows[row++], 'a row of logits'))
    }
    if (this.options.stepMs) Atomics.wait(this.sleeper, 0, 0, this.options.stepMs)
    const { fault } = this.options
    if (this.steps++ === fault?.atStep) this.fail(fault.kind)
  }

  collect(): readonly Float32Array[] {
    this.kv.endReading()
    return this.rows
  }

  close(): void {}

  private fail(kind: NullFault['kind']): void {
    if (kind === 'throw') throw new LatticeError('backend_failed', 'The null backend failed.')
    if (kind === 'crash') throw new TypeError('the null backend crashed')
    if (kind === 'exit') process.exit(1)
    this.rows[0]?.fill(Number.NaN)
  }
}

/** Fills a row with the logits, from -4 to 4, that follow a sequence of this hash. */
export function nullLogits(hash: number, row: Float32Array): void {
  let state = hash
  for (let i = 0; i < row.length; i++) {
    state = (state + 0x9e3779b9) >>> 0
    let mixed = Math.imul(state ^ (state >>> 16), 0x21f0aaad)
    mixed = Math.imul(mixed ^ (mixed >>> 15), 0x735a2d97)
    row[i] = ((mixed ^ (mixed >>> 15)) >>> 0) / 2 ** 29 - 4
  }
}
