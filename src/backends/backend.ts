// Owns the contract between the engine and whatever computes: a batch of tokens goes in, rows of
// logits come out, keys and values land in slots. The CPU, CUDA and null backends fulfil it.

import { assert } from '../assert.ts'
import type { SamplingParams, TokenLogprobs } from '../engine/api.ts'
import type { KvLayout } from '../kv/layout.ts'
import type { KvColumns, KvMover } from '../kv/regions.ts'
import type { KvTier } from '../kv/tier.ts'

/**
 * One step's work, in arrays that are filled again for every step. Segment i is `counts[i]`
 * consecutive tokens of the sequence in `slots[i]`, the first at position `starts[i]`.
 */
export class StepBatch {
  readonly tokens: Int32Array
  readonly slots: Int32Array
  readonly starts: Int32Array
  readonly counts: Int32Array
  /** 1 where the distribution after the segment's last token is wanted. */
  readonly wantsLogits: Uint8Array
  segments = 0
  tokenCount = 0

  constructor(maxTokens: number, maxSegments: number) {
    this.tokens = new Int32Array(maxTokens)
    this.slots = new Int32Array(maxSegments)
    this.starts = new Int32Array(maxSegments)
    this.counts = new Int32Array(maxSegments)
    this.wantsLogits = new Uint8Array(maxSegments)
  }

  clear(): void {
    this.segments = 0
    this.tokenCount = 0
  }

  /** Adds `count` tokens of `from`, starting at `offset`, as the next segment. */
  add(
    slot: number,
    start: number,
    from: ArrayLike<number>,
    offset: number,
    count: number,
    wantsLogits: boolean,
  ): void {
    const i = this.segments++
    assert(i < this.slots.length, 'a step has no more segments than sequences')
    assert(this.tokenCount + count <= this.tokens.length, 'a step keeps to its token budget')
    this.slots[i] = slot
    this.starts[i] = start
    this.counts[i] = count
    this.wantsLogits[i] = wantsLogits ? 1 : 0
    for (let t = 0; t < count; t++) this.tokens[this.tokenCount + t] = from[offset + t] ?? 0
    this.tokenCount += count
  }
}

/** The memory that sequences' keys and values live in; physical pages come and go beneath it. */
export interface KvMemory extends KvMover {
  readonly layout: KvLayout
  readonly slots: number
  /** At first, slot i is mapped to region i. */
  readonly regions: number
  /** Bytes that are physically present now, by the owner's own account (kernel or driver). */
  residentBytes(): number
  /**
   * Gives back memory that is kept ready and was idle for a while, if the kernel does not see to
   * that by itself.
   * @returns milliseconds until there is more to give back, or undefined if there is nothing
   */
  settle?(nowMs: number): number | undefined
  /** Where columns can go, if anywhere. */
  readonly tier?: KvTier
  /** There if other processes can take memory that was free. */
  readonly contended?: ContendedMemory
}

/** Memory of which less may be had than was asked for at the start. */
export interface ContendedMemory {
  /**
   * Waits until all is there that grew. The columns that it names are not, and what is written
   * there is lost: whoever holds them must let go of them, before a step or when what is being
   * loaded there has been. Of region -1 are those that nobody held.
   */
  lacking(): readonly KvColumns[]
  /** Pages that there are, and up to so many more that could be had now. */
  obtainablePages(more: number): number
  /** No more than this will be asked for, until it is told otherwise. */
  limit(pages: number): void
}

/** What a sequence asks of whoever chooses its tokens. */
export interface SlotSampling {
  params: SamplingParams
  /** Counted for the repetition penalty. */
  prompt: Int32Array
  /** What it generated already, if it comes back after being preempted. */
  output: Int32Array
  /** Log-probabilities to find for each token, if any. */
  topLogprobs?: number | undefined
}

/**
 * A backend that chooses tokens where it computes logits. Steps queue up behind each other: what is
 * done to KV memory after a step was queued, happens after that step.
 */
export interface TokenChooser {
  /**
   * Whether tokens can be chosen so; if not, whoever asks chooses from logits.
   * @param topLogprobs as in `SlotSampling`
   */
  takes(params: SamplingParams, topLogprobs?: number): boolean
  /** From its next step on, the tokens of a slot's sequence are chosen so. */
  begin(slot: number, sampling: SlotSampling): void
  /**
   * Queues a step. A token of -1 in the batch is the one that was chosen last for its slot: the
   * host need not know it yet.
   * @param logits whether `collect` will be called for the step, before another one is queued
   * @returns the step's number; two may be under way
   */
  launchChoosing(batch: StepBatch, logits: boolean): number
  /**
   * Waits for a step: its tokens in the order of the segments that wanted one, -1 where logits were
   * no numbers. Valid until one more step is queued.
   * @throws LatticeError `backend_failed` or `gpu_call_failed`
   */
  tokensOf(step: number): Int32Array
  /**
   * Log-probabilities of a step's output that `tokensOf` has waited for, whose sequence asked for
   * `top` of the likeliest tokens. Valid as long as its token.
   */
  logprobsOf(step: number, output: number, top: number): TokenLogprobs
}

export interface Backend {
  readonly vocab: number
  /** Tokens of one step, at most. */
  readonly stepTokensMax: number
  /**
   * Prompts are computed whole or in chunks no shorter than this. A backend that computes long and
   * short chunks with different kernels names the border here: a token's bits then do not depend
   * on how a prompt was cut, which depends on what else was running.
   */
  readonly chunkTokensMin: number
  readonly kv: KvMemory
  readonly chooser?: TokenChooser
  /** Starts a step. Pages that its tokens need must be within the limit already. */
  launch(batch: StepBatch): void
  /**
   * Waits for the step: one row of `vocab` float32 logits for each segment that wants them, in
   * segment order. The rows are valid, and may be written to, until the next launch.
   * @throws LatticeError `backend_failed`
   */
  collect(): readonly Float32Array[]
  close(): void
}
