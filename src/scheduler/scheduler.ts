// Owns what runs in the next step: which sequences decode, which chunk of which prompt is filled
// in beside them, who is let in and who must make room. A pure function of queues, memory and a
// token budget; it has no clock and does no I/O. After Orca (Yu et al. 2022) for joining at every
// step and Sarathi-Serve (Agrawal et al. 2024) for sharing a step with chunks of prompts.

import { assert, present } from '../assert.ts'
import { type KvSpan, spannedTokens } from '../kv/regions.ts'
import type { SlotTable } from '../kv/slots.ts'
import type { Image, Tiers } from '../kv/tiers.ts'
import { type Growing, OutputLengths, peakPages } from './growth.ts'

/** What the scheduler sees, and changes, of a sequence. */
export interface Schedulable {
  /** Tokens known: prompt and output. */
  readonly length: number
  /** The first of them, which are computed in chunks; what was decoded is computed so again. */
  readonly promptLength: number
  /** Tokens whose KV is in memory. */
  computed: number
  /** Tokens that it may have in the end. */
  readonly lengthMax: number
  /** -1 while waiting. */
  slot: number
  /** What it has outside of memory, or on the way; it does not run meanwhile. */
  image: Image | undefined
  /** How often it had to make room. */
  preemptions: number
}

/** What of a sequence may be in memory before it is let in. */
export interface Sharing<S> {
  /**
   * Where its first tokens lie; 'wait' while another sequence is about to compute them, 'coming'
   * while they come from outside of memory: others may go first.
   */
  prefixOf(sequence: S): readonly KvSpan[] | 'wait' | 'coming'
  /** Lets go of a cached prefix, to make room. False if there is none. */
  evict(): boolean
}

/** How a sequence that makes room comes back. */
export interface Preemption {
  readonly tiers: Tiers
  /** Something is on its way out of memory or back. */
  readonly busy: boolean
  /** Pages that become free without anybody's doing. */
  readonly leavingPages: number
  /** Whether moving so many pages costs less than computing so many tokens. */
  preferMoving(pages: number, promptTokens: number, outputTokens: number): boolean
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
  /** Lets in whoever fits now, whatever those that run will need. */
  greedy?: boolean
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
  /** Sequences that made room, by how they were to come back. */
  readonly preemptions = { offload: 0, recompute: 0 }
  /** Those of them that had to be computed again because writing or reading failed. */
  imagesLost = 0
  private readonly slots: SlotTable
  private readonly options: SchedulerOptions
  private readonly sharing: Sharing<S>
  private readonly preemption: Preemption | undefined
  private readonly lengths = new OutputLengths()
  /** Pages that sequences of this step wait for while others leave. */
  private owedPages = 0
  private readonly parts: ScheduledPart<S>[] = []
  /** Part objects of earlier steps, to be filled again. */
  private readonly pool: ScheduledPart<S>[] = []

  constructor(
    slots: SlotTable,
    options: SchedulerOptions,
    sharing: Sharing<S>,
    preemption?: Preemption,
  ) {
    assert(
      options.stepTokens >= stepTokensNeeded(options.maxSequences, options.chunkTokensMin),
      'every sequence can decode in every step, and a prompt advance beside them',
    )
    this.slots = slots
    this.options = options
    this.sharing = sharing
    this.preemption = preemption
  }

  /**
   * Takes note of what has moved out of memory, or back, since the last call.
   * @throws LatticeError `pager_failed`
   */
  settle(nowMs: number): void {
    for (const image of this.preemption?.tiers.poll(nowMs) ?? []) {
      if (image.state === 'back') this.resumed(image)
      else if (image.state === 'lost') this.computeAgain(image)
    }
  }

  /**
   * The next step's parts: decoding sequences first, by slot (so that evenly spaced ones can be
   * attended together), then prompts in order of arrival, as far as the budget goes. Empty when
   * there is nothing to do. Valid until the next call.
   */
  plan(): readonly ScheduledPart<S>[] {
    this.parts.length = 0
    this.owedPages = 0
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
    this.lengths.ended(sequence.length - sequence.promptLength)
    const waitingAt = this.waiting.indexOf(sequence)
    if (waitingAt >= 0) this.waiting.splice(waitingAt, 1)
    const runningAt = this.running.indexOf(sequence)
    if (runningAt >= 0) this.running.splice(runningAt, 1)
    if (sequence.image) this.forgetImage(sequence, sequence.image)
    if (sequence.slot >= 0) this.slots.retire(sequence.slot, sinceMs)
    sequence.slot = -1
  }

  private planDecodes(): void {
    // Making room takes out the last of the running, never one that this loop has passed.
    for (let i = 0; i < this.running.length; i++) {
      const sequence = present(this.running[i], 'a running sequence')
      if (sequence.image || !isDecoding(sequence)) continue
      if (this.makeRoom(sequence, sequence.length)) {
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
      if (sequence.image || isDecoding(sequence)) continue
      used += this.planChunk(sequence, budget - used)
    }
    return used
  }

  /** Lets sequences in while there is budget; a prompt gets all of its pages now or waits. */
  private admit(budget: number): void {
    let left = budget
    let at = 0
    // Who runs already waits for memory: nobody else gets any.
    while (left > 0 && this.owedPages === 0 && this.hasSlot()) {
      const sequence = this.waiting[at]
      if (!sequence || (!sequence.image && this.chunkOf(sequence, left) === 0)) return
      let entry = this.letIn(sequence)
      while (entry === false && this.unblock()) entry = this.letIn(sequence)
      if (entry === 'coming') at++
      if (entry === false) return
      if (entry !== true) continue
      this.waiting.splice(at, 1)
      this.running.push(sequence)
      if (sequence.image) continue
      if (!isDecoding(sequence)) left -= this.planChunk(sequence, left)
      else {
        this.addPart(sequence, 1)
        left--
      }
    }
  }

  private hasSlot(): boolean {
    const leaving = this.preemption?.tiers.leavingSlots ?? 0
    return this.running.length + leaving < this.options.maxSequences
  }

  private letIn(sequence: S): boolean | 'coming' {
    if (sequence.image) return this.resume(sequence, sequence.image)
    const shared = this.sharing.prefixOf(sequence)
    if (shared === 'wait') return false
    if (shared === 'coming') return shared
    if (this.expectsRoom(sequence, shared) && this.place(sequence, shared)) return true
    // With nobody to wait for, what a prefix keeps from being evicted may be what is missing.
    return this.running.length === 0 && this.place(sequence, [])
  }

  /** Whether a sequence can run beside the others without throwing any out before it ends. */
  private expectsRoom(sequence: S, shared: readonly KvSpan[]): boolean {
    if (this.options.greedy || this.running.length === 0) return true
    const { slots } = this
    let room = slots.availableBeside(shared) + (this.preemption?.leavingPages ?? 0)
    const growing = this.running.map((running): Growing => {
      const pages = slots.pagesOf(running.slot)
      room += pages
      return { pages, remaining: this.remaining(running) }
    })
    const pages = slots.pagesBeside(sequence.length + 1, shared)
    growing.push({ pages, remaining: this.remaining(sequence) })
    const { ranges, tokenStride, shape } = slots.layout
    return peakPages(growing, (ranges * tokenStride) / shape.pageBytes, ranges) <= room
  }

  private remaining({ lengthMax, length, preemptions }: S): number {
    return this.lengths.remaining(lengthMax - length, preemptions)
  }

  /**
   * When nothing runs, or is on its way, what images keep in memory may be what is missing: the
   * last of the queue gives up its own.
   * @returns false if there is none, or something to wait for
   */
  private unblock(): boolean {
    if (this.running.length > 0 || this.preemption?.busy) return false
    const last = this.waiting.findLast(({ image }) => image && image.shared.length > 0)
    if (!last?.image) return false
    this.forgetImage(last, last.image)
    return true
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
    const slot = shared.length > 0 ? this.acquireFresh(shared) : this.acquire(tokens)
    if (slot < 0) {
      slots.unpin(shared)
      return false
    }
    sequence.slot = slot
    sequence.computed = spannedTokens(shared)
    // A fork without anything to compute now grows in the step that writes its next token.
    if (sequence.computed === sequence.length) return true
    assert(this.growOrReclaim(sequence, tokens), 'a sequence that fits gets its pages')
    return true
  }

  /** Finds a slot and pages for a sequence whose image is out, and begins to fill them. */
  private resume(sequence: S, image: Image): boolean {
    const tokens = sequence.length + 1
    if (image.state !== 'out' || !this.expectsRoom(sequence, image.shared)) return false
    if (!this.slots.fits(tokens, image.shared)) return false
    const slot = this.acquireFresh(image.shared)
    if (slot < 0) return false
    sequence.slot = slot
    assert(this.growOrReclaim(sequence, tokens), 'a sequence that fits gets its pages')
    if (this.preemption?.tiers.back(image, slot)) this.resumed(image, sequence)
    return true
  }

  private planChunk(sequence: S, budget: number): number {
    const count = this.chunkOf(sequence, budget)
    if (count > 0) this.addPart(sequence, count)
    return count
  }

  /** Tokens of the prompt that go into a step with this budget, so that no chunk is too short. */
  private chunkOf(sequence: S, budget: number): number {
    const remaining = sequence.promptLength - sequence.computed
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

  /**
   * Finds pages for a decoding sequence, preempting later ones if need be.
   * @returns false if it gave way itself, or waits until others have left
   */
  private makeRoom(sequence: S, tokens: number): boolean {
    while (!this.growOrReclaim(sequence, tokens)) {
      const missing = this.slots.missingPages(sequence.slot, tokens)
      const leaving = this.preemption?.leavingPages ?? 0
      if (this.owedPages + missing <= leaving) {
        this.owedPages += missing
        return false
      }
      const victim = present(this.running.at(-1), 'a running sequence')
      this.preempt(victim)
      if (victim === sequence) return false
    }
    return true
  }

  /** Sends the last of those that run back to the queue's front. */
  private preempt(sequence: S): void {
    assert(this.running.pop() === sequence, 'the last gives way')
    sequence.preemptions++
    this.vacate(sequence)
    sequence.slot = -1
    sequence.computed = 0
    this.waiting.unshift(sequence)
  }

  /** Its pages are moved out, or given back if they are sooner computed again. */
  private vacate(sequence: S): void {
    const { slot, computed, promptLength, image } = sequence
    const { tiers } = this.preemption ?? {}
    if (image) {
      this.preemptions.offload++
      return tiers?.stop(image)
    }
    if (tiers && computed > 0) {
      const pages = tiers.columnsToMove(slot, computed) * this.slots.layout.ranges
      const outputs = Math.max(0, computed - promptLength)
      if (this.preemption?.preferMoving(pages, computed - outputs, outputs)) {
        sequence.image = tiers.out(slot, computed)
      }
    }
    if (sequence.image) this.preemptions.offload++
    else {
      this.preemptions.recompute++
      this.slots.retire(slot, -Infinity)
    }
  }

  private resumed(image: Image, sequence = this.running.find((s) => s.image === image)): void {
    const { tokens } = image
    const resumed = present(sequence, 'whose image is back')
    resumed.computed = tokens
    resumed.image = undefined
  }

  /** Of an image that was on its way nothing is left. */
  private computeAgain(image: Image): void {
    this.imagesLost++
    const at = this.running.findIndex((sequence) => sequence.image === image)
    const sequence = this.running[at] ?? this.waiting.find((waiting) => waiting.image === image)
    const lost = present(sequence, 'whose image is lost')
    lost.image = undefined
    lost.slot = -1
    if (at < 0) return
    this.running.splice(at, 1)
    this.waiting.unshift(lost)
  }

  private forgetImage(sequence: S, image: Image): void {
    this.preemption?.tiers.drop(image)
    sequence.image = undefined
    sequence.slot = -1
  }

  private growOrReclaim(sequence: S, tokens: number): boolean {
    while (!this.slots.grow(sequence.slot, tokens)) if (!this.reclaimOne()) return false
    return true
  }

  private acquire(tokens: number): number {
    for (;;) {
      const slot = this.slots.acquire(tokens)
      if (slot >= 0 || !this.reclaimOne()) return slot
    }
  }

  /** A slot that nobody has written to. */
  private acquireFresh(shared: readonly KvSpan[]): number {
    for (;;) {
      const slot = this.slots.acquireShared(shared)
      if (slot >= 0 || !this.reclaimOne()) return slot
    }
  }

  private reclaimOne(): boolean {
    return this.slots.reclaim(Infinity) >= 0 || this.sharing.evict()
  }
}

/**
 * Its prompt is in memory: it goes on by a token a step. After a preemption these are known at
 * first, and computed as they were before, so that they have the same bits.
 */
export function isDecoding(sequence: Schedulable): boolean {
  return sequence.computed >= sequence.promptLength
}
