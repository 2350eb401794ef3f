// Owns how a step's attention is cut into pieces that one ggml operation each computes: a prefill
// chunk alone, decoding sequences in evenly spaced slots together. A piece is a base address and
// strides over slots; nothing ever looks up a block table.

import type { StepBatch } from '../backend.ts'

/**
 * Sequences of lengths this far apart do not share a piece. A masked position costs about 0.7 ns a
 * head, a piece of its own about 1.5 µs a layer (two barriers): with ~9 heads they meet near 256.
 */
const LENGTH_SPREAD_MAX = 256

/**
 * Lone queries that see more than this have their KV length rounded up to a multiple of it, the
 * rest hidden (and never read). ggml splits lengths of 512 and more among its threads and adds the
 * parts up in float16, so the place of the cut shows in the last bits. Rounding as llama.cpp does
 * puts the cut where it has it: distributions then agree to the bit, instead of to 3e-3 nats.
 * Several sequences in one operation are not split, so these are always computed alone: a
 * sequence's tokens must not depend on which others share its step.
 */
const SPLIT_ROUNDING = 256

/** Half-precision bit patterns of the mask. */
const VISIBLE = 0
const HIDDEN = 0xfc00

/** One attention operation over `sequences` slots, `slotStep` apart, `queries` tokens of each. */
export interface AttentionPiece {
  firstToken: number
  queries: number
  sequences: number
  slot: number
  slotStep: number
  /** Positions before this one are not read (sliding window), the same for all sequences. */
  kvStart: number
  kvTokens: number
  /** Offset in the mask memory in elements, or -1: all positions are visible. */
  mask: number
}

/** A layer kind's pieces: global layers see everything, sliding-window layers the last tokens. */
export class AttentionPlan {
  readonly pieces: AttentionPiece[] = []
  count = 0
  private readonly window: number
  private readonly mask: Uint16Array
  private maskUsed = 0

  /** @param window tokens visible to a query, itself included; Infinity for global layers. */
  constructor(window: number, mask: Uint16Array) {
    this.window = window
    this.mask = mask
  }

  /** Cuts the batch's segments, in their order, into pieces and writes their masks. */
  plan(batch: StepBatch): void {
    this.count = 0
    this.maskUsed = 0
    let token = 0
    for (let s = 0; s < batch.segments;) {
      const together = batch.counts[s] === 1 ? this.decodeRun(batch, s) : 1
      const piece = this.next()
      piece.firstToken = token
      piece.sequences = together
      piece.queries = batch.counts[s] ?? 0
      piece.slot = batch.slots[s] ?? 0
      piece.slotStep = together > 1 ? (batch.slots[s + 1] ?? 0) - piece.slot : 1
      if (together > 1) this.maskDecode(piece, batch, s)
      else this.maskChunk(piece, batch.starts[s] ?? 0)
      token += piece.queries * together
      s += together
    }
  }

  /** How many single-token segments from `first` on form one evenly spaced run. */
  private decodeRun(batch: StepBatch, first: number): number {
    const { slots, starts, counts } = batch
    const step = (slots[first + 1] ?? 0) - (slots[first] ?? 0)
    let shortest = starts[first] ?? 0
    let longest = shortest
    let run = 1
    if (this.visible(longest) > SPLIT_ROUNDING) return run
    for (let s = first + 1; s < batch.segments && counts[s] === 1 && step > 0; s++) {
      if ((slots[s] ?? 0) - (slots[s - 1] ?? 0) !== step) break
      shortest = Math.min(shortest, starts[s] ?? 0)
      longest = Math.max(longest, starts[s] ?? 0)
      if (longest - shortest > LENGTH_SPREAD_MAX || this.visible(longest) > SPLIT_ROUNDING) break
      run++
    }
    return run
  }

  private maskDecode(piece: AttentionPiece, batch: StepBatch, first: number): void {
    let start = Infinity
    let end = 0
    let even = true
    for (let i = 0; i < piece.sequences; i++) {
      const position = batch.starts[first + i] ?? 0
      if (i > 0 && position !== batch.starts[first]) even = false
      start = Math.min(start, this.firstVisible(position))
      end = Math.max(end, position + 1)
    }
    piece.kvStart = start
    piece.kvTokens = end - start
    piece.mask = even ? -1 : this.reserveMask(piece.sequences * piece.kvTokens)
    if (even) return
    for (let i = 0; i < piece.sequences; i++) {
      const row = piece.mask + i * piece.kvTokens
      this.maskRow(row, piece, batch.starts[first + i] ?? 0)
    }
  }

  private maskChunk(piece: AttentionPiece, start: number): void {
    piece.kvStart = this.firstVisible(start)
    piece.kvTokens = start + piece.queries - piece.kvStart
    const split = piece.queries === 1 && piece.kvTokens > SPLIT_ROUNDING
    if (split) piece.kvTokens = Math.ceil(piece.kvTokens / SPLIT_ROUNDING) * SPLIT_ROUNDING
    piece.mask = -1
    if (piece.queries === 1 && !split) return
    piece.mask = this.reserveMask(piece.queries * piece.kvTokens)
    for (let i = 0; i < piece.queries; i++) {
      this.maskRow(piece.mask + i * piece.kvTokens, piece, start + i)
    }
  }

  /** Makes visible what the query at `position` may see, hides the rest of the row. */
  private maskRow(row: number, piece: AttentionPiece, position: number): void {
    const from = row + this.firstVisible(position) - piece.kvStart
    const to = row + position + 1 - piece.kvStart
    this.mask.fill(HIDDEN, row, from)
    this.mask.fill(VISIBLE, from, to)
    this.mask.fill(HIDDEN, to, row + piece.kvTokens)
  }

  /** Positions that the query at `position` sees, itself included. */
  private visible(position: number): number {
    return position + 1 - this.firstVisible(position)
  }

  private firstVisible(position: number): number {
    return Math.max(0, position + 1 - this.window)
  }

  private reserveMask(elements: number): number {
    const at = this.maskUsed
    this.maskUsed += elements
    return at
  }

  private next(): AttentionPiece {
    const i = this.count++
    return (this.pieces[i] ??= {
      firstToken: 0,
      queries: 0,
      sequences: 0,
      slot: 0,
      slotStep: 1,
      kvStart: 0,
      kvTokens: 0,
      mask: -1,
    })
  }
}

/** Layers that see everything, layers with a sliding window, and the last one's outputs alone. */
export type AttentionKind = 'global' | 'window' | 'outputs'

/** A step's plans for every kind of layer that the program has. */
export class AttentionPlans implements Record<AttentionKind, AttentionPlan> {
  readonly global: AttentionPlan
  readonly window: AttentionPlan
  readonly outputs: AttentionPlan
  private readonly sliding: boolean

  /**
   * @param window of the sliding layers, if there are any
   * @param lastWindow of the last layer; Infinity if it is global
   */
  constructor(
    window: number | undefined,
    lastWindow: number,
    masks: Record<AttentionKind, Uint16Array>,
  ) {
    this.sliding = window !== undefined
    this.global = new AttentionPlan(Infinity, masks.global)
    this.window = new AttentionPlan(window ?? Infinity, masks.window)
    this.outputs = new AttentionPlan(lastWindow, masks.outputs)
  }

  /** @param outputs the last token of each segment whose logits are wanted, as a batch. */
  plan(batch: StepBatch, outputs: StepBatch): void {
    this.global.plan(batch)
    if (this.sliding) this.window.plan(batch)
    this.outputs.plan(outputs)
  }

  /** The most pieces that any layer has. */
  pieces(): number {
    return Math.max(this.global.count, this.window.count, this.outputs.count)
  }
}
