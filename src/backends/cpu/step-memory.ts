// Owns the memory that a step reads and writes besides weights and KV: token ids, positions, rows,
// masks, activations, logits. One mapping, made once; addresses for graphs, views for TypeScript.

import { present } from '../../assert.ts'
import { mapAnonymous, unmap, viewMemory } from '../../ffi/libc.ts'
import type { KvLayout } from '../../kv/layout.ts'
import type { Rows } from '../../model/program.ts'
import { StepBatch } from '../backend.ts'
import type { AttentionKind } from './attention.ts'

/** Areas start on cache lines. */
const ALIGNMENT = 64

/** A lone query's KV length is rounded up by less than this; see attention.ts. */
const MASK_ROUNDING = 256

export interface StepSizes {
  activationBytes: number
  stepTokens: number
  maxSequences: number
  contextLength: number
  vocab: number
}

export class StepMemory {
  readonly activations: number
  readonly tokens: number
  /** Positions of the tokens, and of the outputs among them. */
  readonly positions: Record<Rows, number>
  /** Row of each token in the KV memory: slot · rows of a slot + position. */
  readonly kvRows: number
  /** Indices of the tokens whose logits are wanted. */
  readonly outputs: number
  readonly logits: number
  readonly masks: Record<AttentionKind, number>
  readonly maskViews: Record<AttentionKind, Uint16Array>
  /** One for each output of a step. */
  readonly logitsRows: readonly Float32Array[]
  /** The last token of each segment whose logits are wanted, as a batch. */
  readonly outputBatch: StepBatch
  private readonly block: { address: number; bytes: number }
  private readonly tokenView: Int32Array
  private readonly positionView: Int32Array
  private readonly outputPositionView: Int32Array
  /** Low and high words of 64-bit rows. */
  private readonly kvRowView: Int32Array
  private readonly outputView: Int32Array

  constructor({ activationBytes, stepTokens, maxSequences, contextLength, vocab }: StepSizes) {
    const maskRow = (contextLength + MASK_ROUNDING) * Uint16Array.BYTES_PER_ELEMENT
    const sizes = {
      activations: activationBytes,
      tokens: stepTokens * 4,
      positions: stepTokens * 4,
      outputPositions: maxSequences * 4,
      kvRows: stepTokens * 8,
      outputs: maxSequences * 4,
      logits: maxSequences * vocab * 4,
      maskGlobal: (stepTokens + maxSequences) * maskRow,
      maskWindow: (stepTokens + maxSequences) * maskRow,
      maskOutputs: maxSequences * maskRow,
    }
    const offsets = new Map<string, number>()
    let bytes = 0
    for (const [name, size] of Object.entries(sizes)) {
      offsets.set(name, bytes)
      bytes += Math.ceil(size / ALIGNMENT) * ALIGNMENT
    }
    const address = mapAnonymous(bytes)
    this.block = { address, bytes }
    const at = (name: keyof typeof sizes): number => address + present(offsets.get(name), name)
    const view = (name: keyof typeof sizes): ArrayBuffer => viewMemory(at(name), sizes[name])
    this.activations = at('activations')
    this.tokens = at('tokens')
    this.positions = { tokens: at('positions'), outputs: at('outputPositions') }
    this.kvRows = at('kvRows')
    this.outputs = at('outputs')
    this.logits = at('logits')
    this.masks = { global: at('maskGlobal'), window: at('maskWindow'), outputs: at('maskOutputs') }
    this.maskViews = {
      global: new Uint16Array(view('maskGlobal')),
      window: new Uint16Array(view('maskWindow')),
      outputs: new Uint16Array(view('maskOutputs')),
    }
    this.tokenView = new Int32Array(view('tokens'))
    this.positionView = new Int32Array(view('positions'))
    this.outputPositionView = new Int32Array(view('outputPositions'))
    this.kvRowView = new Int32Array(view('kvRows'))
    this.outputView = new Int32Array(view('outputs'))
    this.outputBatch = new StepBatch(maxSequences, maxSequences)
    const logits = view('logits')
    this.logitsRows = Array.from(
      { length: maxSequences },
      (_, i) => new Float32Array(logits, i * vocab * 4, vocab),
    )
  }

  /** Writes a step's inputs. */
  fill(batch: StepBatch, layout: KvLayout): void {
    const slotRows = layout.slotBytes / layout.tokenStride
    const outputs = this.outputBatch
    this.tokenView.set(batch.tokens.subarray(0, batch.tokenCount))
    outputs.clear()
    let token = 0
    for (let s = 0; s < batch.segments; s++) {
      const slot = batch.slots[s] ?? 0
      const start = batch.starts[s] ?? 0
      const count = batch.counts[s] ?? 0
      const row = slot * slotRows + start
      for (let i = 0; i < count; i++, token++) {
        this.positionView[token] = start + i
        this.kvRowView[token * 2] = (row + i) % 2 ** 32
        this.kvRowView[token * 2 + 1] = Math.floor((row + i) / 2 ** 32)
      }
      if (!batch.wantsLogits[s]) continue
      this.outputView[outputs.segments] = token - 1
      this.outputPositionView[outputs.segments] = start + count - 1
      outputs.add(slot, start + count - 1, batch.tokens, token - 1, 1, true)
    }
  }

  free(): void {
    unmap(this.block.address, this.block.bytes)
  }
}
