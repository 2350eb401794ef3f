// Owns the driving of a CPU backend through golden sequences: which slot holds which sequence up to
// where, and the comparison of every row of logits that a step returns.

import { StepBatch } from '../../src/backends/backend.ts'
import { CpuBackend } from '../../src/backends/cpu/backend.ts'
import { viewMemory } from '../../src/ffi/libc.ts'
import type { Model } from '../../src/model/model.ts'
import type { Golden } from './golden.ts'

export interface StepperOptions {
  slots?: number
  stepTokens?: number
  variant?: string
  /** One, unless said: several wait for each other, which takes long on a busy machine. */
  threads?: number
  /** Instead of the family's own model, one that differs from it on purpose. */
  model?: Model
}

/** The next `count` tokens of the sequence in a slot. */
export interface Part {
  slot: number
  count: number
  /** Whether logits are asked for; true unless said. */
  wants?: boolean
}

const NAN_F16 = 0x7e00

export class Stepper implements Disposable {
  readonly backend: CpuBackend
  /** The largest relative error of all rows so far. */
  worst = 0
  private readonly golden: Golden
  private readonly batch: StepBatch
  private readonly held = new Map<number, { sequence: number; length: number }>()

  constructor(golden: Golden, options: StepperOptions = {}) {
    const { slots = 8, stepTokens = 704, threads = 1, variant } = options
    const longest = Math.max(...golden.sequences.map(({ tokens }) => tokens.length))
    this.golden = golden
    this.batch = new StepBatch(stepTokens, slots)
    this.backend = new CpuBackend(options.model ?? golden.model, {
      contextLength: longest + 3,
      maxSequences: slots,
      stepTokens,
      cpus: Array.from({ length: threads }, (_, i) => i),
      pin: false,
      ...(variant === undefined ? {} : { variant }),
    })
    this.poison()
  }

  /** Puts a sequence at its start into a slot. */
  hold(slot: number, sequence: number): void {
    this.held.set(slot, { sequence, length: 0 })
  }

  holds(slot: number): boolean {
    return this.held.has(slot)
  }

  /** Tokens of the slot's sequence that have not been fed. */
  left(slot: number): number {
    const { sequence, length } = this.in(slot)
    return this.golden.sequence(sequence).tokens.length - length
  }

  /** Runs one step of parts, in their order, and checks each row that comes back. */
  step(...parts: Part[]): void {
    for (const { error, at, row } of this.run(...parts)) {
      if (!(error <= this.worst)) this.worst = error
      this.golden.check(at.sequence, at.position, row)
    }
  }

  /** Runs one step and gives each row's error, without judging it. */
  run(...parts: Part[]) {
    this.batch.clear()
    const wanted: { sequence: number; position: number }[] = []
    for (const { slot, count, wants = true } of parts) {
      const held = this.in(slot)
      const { tokens } = this.golden.sequence(held.sequence)
      this.batch.add(slot, held.length, tokens, held.length, count, wants)
      held.length += count
      if (wants) wanted.push({ sequence: held.sequence, position: held.length - 1 })
    }
    this.backend.launch(this.batch)
    const rows = this.backend.collect()
    return wanted.map((at, i) => {
      const row = rows[i] ?? new Float32Array()
      return { at, row, error: this.golden.error(at.sequence, at.position, row) }
    })
  }

  /** Feeds what is left of a slot's sequence in chunks of the given sizes, over and over. */
  finish(slot: number, ...sizes: number[]): void {
    for (let i = 0; this.left(slot) > 0; i++) {
      this.step({ slot, count: Math.min(sizes[i % sizes.length] ?? 1, this.left(slot)) })
    }
  }

  /** Gives a slot's pages back; they read as zeros from then on. */
  release(slot: number): void {
    this.held.delete(slot)
    this.backend.kv.release(slot)
  }

  /** Fills KV memory with NaN: whatever is read before it was written spoils the logits. */
  poison(): void {
    const { address, layout, slots } = this.backend.kv
    new Uint16Array(viewMemory(address, layout.slotBytes * slots)).fill(NAN_F16)
  }

  [Symbol.dispose](): void {
    this.backend.close()
  }

  private in(slot: number): { sequence: number; length: number } {
    const held = this.held.get(slot)
    if (held === undefined) throw new Error(`slot ${slot} holds a sequence`)
    return held
  }
}
