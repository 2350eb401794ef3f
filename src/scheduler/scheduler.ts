// Owns what runs in the next step: which sequences decode, which chunk of which prompt is filled
// in beside them, who is let in and who must make room. A pure function of queues, memory and a
// token budget; it has no clock and does no I/O. After Orca (Yu et al. 2022) for joining at every
// step and Sarathi-Serve (Agrawal et al. 2024) for sharing a step with chunks of prompts.

import { assert, present } from '../assert.ts'
import { type KvSpan, spannedTokens } from '../kv/regions.ts'
import type { SlotTable } from '../kv/slots.ts'

/** What the scheduler sees, and changes, of a sequence. */
export interface Schedulable {
  /** Tokens known: prompt and output. */
  readonly length: number
  /** Tokens whose KV is in memory. */
  computed: number
  /** -1 while waiting. */
  slot: number
}

/** What of a sequence may be in memory before it is let in. */
export interface Sharing<S> {
  /** Where its first tokens lie; 'wait' while another sequence is about to compute them. */
  prefixOf(sequence: S): readonly KvSpan[] | 'wait'
  /** Lets go of a cached prefix, to make room. False if there is none. */
  evict(): boolean
  /** A sequence is about to lose its slot to make room; it will wait again. */
  preempted?(sequence: S): void
}

/** One sequence's part of a step: `count` tokens from `computed` on. */
export interface ScheduledPart<S> {
  sequence: S
  count: number
}

export interface SchedulerOptions {
  stepTokens: number
  maxSequences: number
  /** No prompt is cut into chunks shorter than this; see `Backend.chunkTokensMin`. */
  chunkTokensMin: number
}

/** The least a step must hold: a token for each sequence, and room to cut a prompt beside them. */
export function stepTokensNeeded(maxSequences: number, chunkTokensMin: number): number {
  return maxSequences - 1 + Math.max(1, 2 * chunkTokensMin - 1)
}

export class Scheduler<S extends Schedulable> {
  /** First come, first served; preempted sequences return to the front. */
  readonly waiting: S[] = []
  /** In order of admission: the last one gives way first. */
  readonly running: S[] = []
  preemptions = 0
  private readonly slots: SlotTable
  private readonly options: SchedulerOptions
  private readonly sharing: Sharing<S>
  private readonly parts: ScheduledPart<S>[] = []
  /** Part objects of earlier steps, to be filled again. */
  private readonly pool: ScheduledPart<S>[] = []

  constructor(slots: SlotTable, options: SchedulerOptions, sharing: Sharing<S>) {
    assert(
      options.stepTokens >= stepTokensNeeded(options.maxSequences, options.chunkTokensMin),
      'every sequence can decode in every step, and a prompt advance beside them',
    )
    this.slots = slots
    this.options = options
    this.sharing = sharing
  }

  /**
   * The next step's parts: decoding sequences first, by slot (so that evenly spaced ones can be
   * attended together), then prompts in order of arrival, as far as the budget goes. Empty when
   * there is nothing to do. Valid until the next call.
   */
  plan(): readonly ScheduledPart<S>[] {
    this.parts.length = 0
    this.planDecodes()
    const budget = this.options.stepTokens - this.parts.length
    this.admit(budget - this.planPrompts(budget))
    return this.parts
  }

  /**
   * Takes a sequence out, wherever it is; its pages stay warm for a while.
   * @param sinceMs as `SlotTable.retire` takes it
   */
  remove(sequence: S, sinceMs: number): void {
    const waitingAt = this.waiting.indexOf(sequence)
    if (waitingAt >= 0) this.waiting.splice(waitingAt, 1)
    const runningAt = this.running.indexOf(sequence)
    if (runningAt >= 0) this.running.splice(runningAt, 1)
    if (sequence.slot >= 0) this.slots.retire(sequence.slot, sinceMs)
    sequence.slot = -1
  }

  private planDecodes(): void {
    // Making room takes out the last of the running, never one that this loop has passed.
    for (let i = 0; i < this.running.length; i++) {
      const sequence = present(this.running[i], 'a running sequence')
      if (isDecoding(sequence) && this.makeRoom(sequence, sequence.length)) {
        this.addPart(sequence, 1)
        this.sortLastPart()
      }
    }
  }

  /** Moves the last part to its place by slot; nearly always it is there already. */
  private sortLastPart(): void {
    const { parts } = this
    const last = present(parts.at(-1), 'a part')
    let at = parts.length - 1
    for (; at > 0; at--) {
      const before = present(parts[at - 1], 'a part')
      if (before.sequence.slot < last.sequence.slot) break
      parts[at] = before
    }
    parts[at] = last
  }

  private planPrompts(budget: number): number {
    let used = 0
    for (const sequence of this.running) {
      if (!isDecoding(sequence)) used += this.planChunk(sequence, budget - used)
    }
    return used
  }

  /** Lets sequences in while there is budget; a prompt gets all of its pages now or waits. */
  private admit(budget: number): void {
    let left = budget
    while (left > 0 && this.running.length < this.options.maxSequences) {
      const sequence = this.waiting[0]
      if (!sequence || this.chunkOf(sequence, left) === 0) return
      const shared = this.sharing.prefixOf(sequence)
      if (shared === 'wait') return
      // With nobody to wait for, what a prefix keeps from being evicted may be what is missing.
      if (!this.place(sequence, shared)) {
        if (this.running.length > 0 || !this.place(sequence, [])) return
      }
      this.waiting.shift()
      this.running.push(sequence)
      left -= this.planChunk(sequence, left)
    }
  }

  /**
   * Lets in the first of the queue with everything that another sequence has in memory.
   * @returns false, with nothing changed, if there is no room for it
   */
  fork(source: S): boolean {
    const sequence = present(this.waiting[0], 'a waiting sequence')
    if (this.running.length === this.options.maxSequences) return false
    if (!this.place(sequence, this.slots.spansOf(source.slot, source.computed))) return false
    this.waiting.shift()
    this.running.push(sequence)
    return true
  }

  /** Finds a slot and pages for a sequence that begins with `shared`. False: there is no room. */
  private place(sequence: S, shared: readonly KvSpan[]): boolean {
    const { slots } = this
    // One token more than it has: else its first output could throw it out again at once.
    const tokens = sequence.length + 1
    if (!slots.fits(tokens, shared)) return false
    slots.pin(shared)
    const slot = this.acquire(tokens, shared)
    if (slot < 0) {
      slots.unpin(shared)
      return false
    }
    sequence.slot = slot
    sequence.computed = spannedTokens(shared)
    assert(this.growOrReclaim(sequence, tokens), 'a sequence that fits gets its pages')
    return true
  }

  private planChunk(sequence: S, budget: number): number {
    const count = this.chunkOf(sequence, budget)
    if (count > 0) this.addPart(sequence, count)
    return count
  }

  /** Tokens of the prompt that go into a step with this budget, so that no chunk is too short. */
  private chunkOf(sequence: S, budget: number): number {
    const remaining = sequence.length - sequence.computed
    if (remaining <= budget) return remaining
    const { chunkTokensMin } = this.options
    const count = Math.min(budget, remaining - chunkTokensMin)
    return count >= chunkTokensMin ? count : 0
  }

  private addPart(sequence: S, count: number): void {
    const part = (this.pool[this.parts.length] ??= { sequence, count })
    part.sequence = sequence
    part.count = count
    this.parts.push(part)
  }

  /** Finds pages for a decoding sequence, preempting later ones if need be. False: it gave way. */
  private makeRoom(sequence: S, tokens: number): boolean {
    while (!this.growOrReclaim(sequence, tokens)) {
      const victim = present(this.running.at(-1), 'a running sequence')
      this.preempt(victim)
      if (victim === sequence) return false
    }
    return true
  }

  /** Sends a sequence back to the queue's front; its tokens are computed again later. */
  private preempt(sequence: S): void {
    this.preemptions++
    this.sharing.preempted?.(sequence)
    this.remove(sequence, -Infinity)
    sequence.computed = 0
    this.waiting.unshift(sequence)
  }

  private growOrReclaim(sequence: S, tokens: number): boolean {
    while (!this.slots.grow(sequence.slot, tokens)) if (!this.reclaimOne()) return false
    return true
  }

  private acquire(tokens: number, shared: readonly KvSpan[]): number {
    for (;;) {
      const slot = shared.length > 0 ? this.slots.acquireShared(shared) : this.slots.acquire(tokens)
      if (slot >= 0 || !this.reclaimOne()) return slot
    }
  }

  private reclaimOne(): boolean {
    return this.slots.reclaim(Infinity) >= 0 || this.sharing.evict()
  }
}

/** One token is pending and everything before it is in memory. */
export function isDecoding(sequence: Schedulable): boolean {
  return sequence.computed > 0 && sequence.length - sequence.computed === 1
}
