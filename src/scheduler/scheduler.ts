// Owns what runs in the next step: which sequences decode, which chunk of which prompt is filled
// in beside them, who is let in and who must make room. A pure function of queues, memory and a
// token budget; it has no clock and does no I/O. After Orca (Yu et al. 2022) for joining at every
// step and Sarathi-Serve (Agrawal et al. 2024) for sharing a step with chunks of prompts.

import { assert, present } from '../assert.ts'
import { LatticeError } from '../errors.ts'
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
  /** Those it goes together with, if any. */
  readonly unit?: SchedulingUnit<Schedulable> | undefined
}

/**
 * Sequences that are let in, decode and give way together, such as beams. One of them waits for
 * all; when its prompt is computed the others fork from it.
 */
export interface SchedulingUnit<S> {
  /** Sequences that it will have, at most. */
  readonly width: number
  /** Pages that it may need to run to its end, and those that it is to find when it is let in. */
  readonly pagesMost: number
  readonly pagesToEnter: number
  /** Those that run, or the one that waits. */
  readonly members: readonly S[]
  /** All have lost their memory: leaves one that begins again. */
  restart(): void
}

/** What of a sequence may be in memory before it is let in. */
export interface Sharing<S> {
  /** Where its first tokens lie; 'wait' while another sequence is about to compute them. */
  prefixOf(sequence: S): readonly KvSpan[] | 'wait'
  /** Lets go of a cached prefix, to make room. False if there is none. */
  evict(): boolean
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
      if (isDecoding(sequence) && this.makeRoom(sequence)) {
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
    while (left > 0) {
      const sequence = this.waiting[0]
      if (!sequence || this.chunkOf(sequence, left) === 0 || !this.mayEnter(sequence)) return
      const shared = this.sharing.prefixOf(sequence)
      if (shared === 'wait') return
      // With nobody to wait for, what a prefix keeps from being evicted may be what is missing.
      if (!this.place(sequence, shared)) {
        if (this.running.length > 0 || !this.place(sequence, [])) return
      }
      this.waiting.shift()
      this.running.push(sequence)
      const { slot, length } = sequence
      assert(this.growOrReclaim(slot, length + 1), 'a sequence that fits gets its pages')
      left -= this.planChunk(sequence, left)
    }
  }

  /**
   * Lets a sequence in, from the queue or not, with everything that another one has in memory. Its
   * slot grows in the step that writes its next token.
   * @returns false, with nothing changed, if there is no room for it
   */
  fork(sequence: S, source: S): boolean {
    if (!this.mayEnter(sequence)) return false
    if (!this.place(sequence, this.slots.spansOf(source.slot, source.computed))) return false
    const at = this.waiting.indexOf(sequence)
    if (at >= 0) this.waiting.splice(at, 1)
    this.running.push(sequence)
    return true
  }

  /**
   * Lets a member of a unit go on from all that another one has in memory.
   * @returns false, with nothing changed, if memory has no region for it
   */
  forkBeam(member: S, parent: S, spansMax: number): boolean {
    const { slots, running } = this
    for (;;) {
      const slot = slots.forkBeam(member.slot, parent.slot, parent.computed, spansMax)
      if (slot < 0) {
        if (this.reclaimOne()) continue
        return false
      }
      if (member.slot < 0) running.splice(running.indexOf(parent) + 1, 0, member)
      member.slot = slot
      member.computed = parent.computed
      return true
    }
  }

  /** @throws LatticeError if a unit could never be let in, or not come to its end alone */
  checkUnit({ width, pagesMost }: SchedulingUnit<S>): void {
    const { maxSequences } = this.options
    const { limitPages } = this.slots
    if (width > maxSequences) {
      throw new LatticeError(
        'invalid_request',
        `${width} beams were asked for; ${maxSequences} sequences run at once here.`,
        {
          todo: 'Ask for fewer, or start with a larger --max-sequences.',
          details: { param: 'best_of' },
        },
      )
    }
    if (pagesMost <= limitPages) return
    throw this.tooLarge({ width, pagesMost })
  }

  /** Why a unit cannot run: what is pinned is not its to have. */
  tooLarge({ width, pagesMost }: Pick<SchedulingUnit<S>, 'width' | 'pagesMost'>): LatticeError {
    const { layout, limitPages } = this.slots
    const { pageBytes } = layout.shape
    const available = this.slots.availablePages() * pageBytes
    return new LatticeError(
      'kv_memory_exhausted',
      `${width} beams may need ${pagesMost * pageBytes} bytes of KV memory; of` +
        ` ${limitPages * pageBytes} they can have ${available}.`,
      { todo: 'Ask for fewer beams or tokens, or start with a larger --kv-memory.' },
    )
  }

  /** The first of the queue if it could not even be let in alone: then it never will be. */
  get stuck(): S | undefined {
    const first = this.waiting[0]
    const alone = this.running.length === 0
    return alone && first && !this.mayEnter(first) ? first : undefined
  }

  /** A unit gets all of its places at once. */
  private mayEnter({ unit }: S): boolean {
    const places = this.running.reduce((sum, sequence) => sum + placesOf(sequence), 0)
    if (places + (unit?.width ?? 1) > this.options.maxSequences) return false
    return !unit || unit.pagesToEnter <= this.slots.availablePages()
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
  private makeRoom(sequence: S): boolean {
    const { unit } = sequence
    while (!this.growForToken(sequence)) {
      const victim = present(this.running.at(-1), 'a running sequence')
      this.preempt(victim)
      if (victim === sequence || (unit && victim.unit === unit)) return false
    }
    return true
  }

  /** All of a unit grow, or none of it runs. */
  private growForToken({ unit, slot, length }: S): boolean {
    if (!unit) return this.growOrReclaim(slot, length)
    return unit.members.every((member) => this.growOrReclaim(member.slot, member.length))
  }

  /** Sends a sequence back to the queue's front; its tokens are computed again later. */
  private preempt(sequence: S): void {
    this.preemptions++
    const members = (sequence.unit?.members ?? [sequence]) as readonly S[]
    for (const member of members) this.remove(member, -Infinity)
    const first = present(members[0], 'a member')
    first.computed = 0
    sequence.unit?.restart()
    this.waiting.unshift(first)
  }

  private growOrReclaim(slot: number, tokens: number): boolean {
    while (!this.slots.grow(slot, tokens)) if (!this.reclaimOne()) return false
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

/** Places that a running sequence takes: the first of a unit takes all of the unit's. */
function placesOf(sequence: Schedulable): number {
  const { unit } = sequence
  if (!unit) return 1
  return unit.members[0] === sequence ? unit.width : 0
}
