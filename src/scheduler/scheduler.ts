// Owns what runs in the next step: which sequences decode, which chunk of which prompt is filled
// in beside them, who is let in and who must make room. A pure function of queues, memory and a
// token budget; it has no clock and does no I/O. After Orca (Yu et al. 2022) for joining at every
// step and Sarathi-Serve (Agrawal et al. 2024) for sharing a step with chunks of prompts.

import { assert, present } from '../assert.ts'
import { LatticeError } from '../errors.ts'
import type { Image } from '../kv/image.ts'
import type { KvSpan } from '../kv/regions.ts'
import type { SlotTable } from '../kv/slots.ts'
import { type Growing, OutputLengths, peakPages } from './growth.ts'
import { Residence } from './residence.ts'
import {
  isDecoding,
  membersOf,
  placesOf,
  type Preemption,
  type Schedulable,
  type SchedulingUnit,
  type Sharing,
} from './schedulable.ts'

export { isDecoding } from './schedulable.ts'
export type { Preemption, Schedulable, SchedulingUnit, Sharing } from './schedulable.ts'

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
  /** First come, first served; who was let in before returns to the front, in that order. */
  readonly waiting: S[] = []
  /** In order of admission: the last one gives way first. */
  readonly running: S[] = []
  /** Sequences that made room and had to be computed again: writing or reading failed. */
  imagesLost = 0
  private readonly slots: SlotTable
  /** Of the slots; there may be less of late, and more again. */
  private readonly limitPages: number
  private readonly options: SchedulerOptions
  private readonly sharing: Sharing<S>
  private readonly preemption: Preemption | undefined
  private readonly residence: Residence<S>
  private readonly lengths = new OutputLengths()
  /** Sequences, or units of them, that were let in. */
  private turns = 0
  /** Pages that sequences of this step wait for while others leave. */
  private owedPages = 0
  /** The first `planned` are the next step's; an array that shrinks to nothing grows anew. */
  private readonly parts: ScheduledPart<S>[] = []
  private planned = 0
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
    this.limitPages = slots.limitPages
    this.options = options
    this.sharing = sharing
    this.preemption = preemption
    this.residence = new Residence(slots, sharing, preemption)
  }

  /** Sequences that made room, by how they were to come back. */
  get preemptions(): { readonly offload: number; readonly recompute: number } {
    return this.residence.preemptions
  }

  /**
   * Takes note of what has moved out of memory, or back, since the last call.
   * @throws LatticeError `pager_failed`
   */
  settle(nowMs: number): void {
    if (!this.preemption) return
    for (const image of this.preemption.tiers.poll(nowMs)) {
      if (image.state === 'lost') this.computeAgain(image)
      if (image.state !== 'back') continue
      const members = this.running.filter((running) => running.image === image)
      this.residence.isBack(members, image)
    }
  }

  /**
   * The next step's parts: decoding sequences first, by slot (so that evenly spaced ones can be
   * attended together), then prompts in order of arrival, as far as the budget goes. Empty when
   * there is nothing to do. Valid until the next call.
   */
  plan(): readonly ScheduledPart<S>[] {
    this.planned = 0
    this.owedPages = 0
    this.planDecodes()
    const budget = this.options.stepTokens - this.planned
    // Mostly all of them decode.
    const prompts = this.planned < this.running.length ? this.planPrompts(budget) : 0
    this.admit(budget - prompts)
    // Who came back with nothing to wait for. Who waits for memory that others leave has it coming:
    // asked again it would be counted twice, and give way itself.
    if (this.planned === 0 && this.owedPages === 0) this.planDecodes()
    this.parts.length = this.planned
    return this.parts
  }

  /**
   * Takes a sequence out, wherever it is; its pages stay warm for a while.
   * @param sinceMs as `SlotTable.retire` takes it
   */
  remove(sequence: S, sinceMs: number): void {
    if (!sequence.unit) this.lengths.ended(sequence.length - sequence.promptLength)
    const waitingAt = this.waiting.indexOf(sequence)
    if (waitingAt >= 0) this.waiting.splice(waitingAt, 1)
    const runningAt = this.running.indexOf(sequence)
    if (runningAt >= 0) this.running.splice(runningAt, 1)
    if (sequence.image) this.residence.forgetImage(sequence, sequence.image)
    if (sequence.slot >= 0) this.slots.retire(sequence.slot, sinceMs)
    sequence.slot = -1
  }

  private planDecodes(): void {
    let stalled: S['unit']
    // Making room takes out the last of the running, never one that this loop has passed.
    for (let i = 0; i < this.running.length; i++) {
      const sequence = present(this.running[i], 'a running sequence')
      if (sequence.image || !isDecoding(sequence) || isStalled(sequence, stalled)) continue
      if (hasAll(sequence)) continue
      if (this.makeRoom(sequence)) {
        this.addPart(sequence, 1)
        this.sortLastPart()
      } else stalled = sequence.unit
    }
  }

  /** Moves the last part to its place by slot; nearly always it is there already. */
  private sortLastPart(): void {
    const { parts } = this
    let at = this.planned - 1
    const last = present(parts[at], 'a part')
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
    let kept = 0
    // Who runs already waits for memory: nobody else gets any.
    while (left > 0 && this.owedPages === 0) {
      const sequence = this.waiting[at]
      if (!sequence) return
      // It made room while its last token was on its way, and ends with that.
      if (hasAll(sequence)) {
        at++
        continue
      }
      while (!this.mayEnter(sequence, kept)) if (!this.unblock()) return
      if (!sequence.image && this.chunkOf(sequence, left) === 0) return
      let entry = this.letIn(sequence, at)
      while (entry === false && this.unblock()) entry = this.letIn(sequence, at)
      if (entry === false) return
      if (entry !== true) {
        at++
        if (entry === 'wait') kept++
        continue
      }
      this.waiting.splice(at, 1)
      this.run(membersOf(sequence))
      if (sequence.image) continue
      if (!isDecoding(sequence)) left -= this.planChunk(sequence, left)
      else if (!sequence.unit) {
        this.addPart(sequence, 1)
        left--
      }
    }
  }

  /** @param before those in the queue that it overtakes */
  private letIn(sequence: S, before: number): boolean | 'wait' | 'coming' {
    const { image } = sequence
    if (image) {
      if (image.state !== 'out' || !this.expectsRoom(sequence, image.shared, before)) return false
      return this.residence.resume(membersOf(sequence), image)
    }
    const shared = this.sharing.prefixOf(sequence)
    if (shared === 'wait' || shared === 'coming') return shared
    const expected = this.expectsRoom(sequence, shared, before)
    if (expected && this.residence.place(sequence, shared)) return true
    // With nobody to wait for, what a prefix keeps from being evicted may be what is missing.
    return this.running.length === 0 && this.residence.place(sequence, [])
  }

  /** Whether a sequence can run beside the others without throwing any out before it ends. */
  private expectsRoom(sequence: S, shared: readonly KvSpan[], before: number): boolean {
    // A unit finds what it needs, or it does not enter.
    if (this.options.greedy || this.running.length === 0 || sequence.unit) return true
    const { slots } = this
    let room = slots.availableBeside(shared) + (this.preemption?.leavingPages ?? 0)
    const growing = this.running.map((running): Growing => {
      const pages = slots.pagesOf(running.slot)
      room += pages
      return { pages, remaining: this.remaining(running) }
    })
    const { ranges, tokenStride, shape } = slots.layout
    // Those before it will share their prompts.
    for (const waiting of before > 0 ? this.waiting.slice(0, before) : []) {
      growing.push({ pages: ranges, remaining: this.remaining(waiting) })
    }
    const pages = slots.pagesBeside(sequence.length + 1, shared)
    growing.push({ pages, remaining: this.remaining(sequence) })
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
    const [first] = this.waiting
    const keeps = this.waiting.findLast(({ image }) => image && image.shared.length > 0)
    // Beams need as many regions as they had, and others may have got some for good.
    const last = keeps ?? (first?.unit ? first : undefined)
    if (!last?.image) return false
    this.residence.forgetImage(last, last.image)
    last.unit?.restart()
    return true
  }

  /**
   * Lets a sequence in, from the queue or not, with everything that another one has in memory. Its
   * slot grows in the step that writes its next token.
   * @returns false, with nothing changed, if there is no room for it
   */
  fork(sequence: S, source: S): boolean {
    const at = this.waiting.indexOf(sequence)
    // Those before it keep their places.
    if (!this.mayEnter(sequence, Math.max(0, at))) return false
    const shared = this.slots.spansOf(source.slot, source.computed)
    if (!this.residence.place(sequence, shared, 'grow later')) return false
    if (at >= 0) this.waiting.splice(at, 1)
    this.run([sequence])
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
        if (this.residence.reclaimOne()) continue
        return false
      }
      if (member.slot < 0) running.splice(running.indexOf(parent) + 1, 0, member)
      member.turn = parent.turn
      member.slot = slot
      member.computed = parent.computed
      return true
    }
  }

  /** @throws LatticeError if a unit could never be let in, or not come to its end alone */
  checkUnit({ width, pagesMost }: SchedulingUnit<S>): void {
    const { maxSequences } = this.options
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
    if (pagesMost <= this.limitPages) return
    throw this.tooLarge({ width, pagesMost })
  }

  /** Why a unit cannot run: what is pinned is not its to have. */
  tooLarge({ width, pagesMost }: Pick<SchedulingUnit<S>, 'width' | 'pagesMost'>): LatticeError {
    const { limitPages } = this
    const { pageBytes } = this.slots.layout.shape
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
    const alone = this.running.length === 0 && !this.preemption?.busy
    return alone && first && !this.mayEnter(first) ? first : undefined
  }

  /**
   * A unit gets all of its places at once.
   * @param kept places for those that came first and wait for what another one computes
   */
  private mayEnter({ unit }: S, kept = 0): boolean {
    const places = this.running.reduce((sum, sequence) => sum + placesOf(sequence), 0)
    const leaving = this.preemption?.tiers.leavingSlots ?? 0
    if (places + leaving + kept + (unit?.width ?? 1) > this.options.maxSequences) return false
    return !unit || unit.pagesToEnter <= this.slots.availablePages()
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
    const part = (this.pool[this.planned] ??= { sequence, count })
    part.sequence = sequence
    part.count = count
    this.parts[this.planned++] = part
  }

  /**
   * Finds pages for a decoding sequence, preempting later ones if need be.
   * @returns false if it gave way itself, or waits until others have left
   */
  private makeRoom(sequence: S): boolean {
    const { unit } = sequence
    while (!this.growForToken(sequence)) {
      const missing = this.missingPages(sequence)
      const leaving = this.preemption?.leavingPages ?? 0
      if (this.owedPages + missing <= leaving) {
        this.owedPages += missing
        return false
      }
      const victim = present(this.running.at(-1), 'a running sequence')
      this.preempt(victim)
      if (victim === sequence || (unit && victim.unit === unit)) return false
    }
    return true
  }

  /** All of a unit grow, or none of it runs. */
  private growForToken({ unit, slot, length }: S): boolean {
    if (!unit) return this.residence.grow(slot, length)
    return unit.members.every((member) => this.residence.grow(member.slot, member.length))
  }

  private missingPages(sequence: S): number {
    const members = sequence.unit?.members ?? [sequence]
    return members.reduce((sum, { slot, length }) => sum + this.slots.missingPages(slot, length), 0)
  }

  /** Memory that it was given is not there: it waits, to be computed or brought back again. */
  giveWay(sequence: S): void {
    this.preempt(sequence, true)
  }

  /** Sends a sequence, and those that go with it, back to its place in the queue. */
  private preempt(sequence: S, refused = false): void {
    const members = membersOf(sequence)
    const first = present(members[0], 'a member')
    const alone = members.length === this.running.length
    for (const member of members) {
      this.sharing.preempted?.(member, alone && !refused)
      this.running.splice(this.running.indexOf(member), 1)
    }
    if (!this.residence.vacate(members, refused)) sequence.unit?.restart()
    this.waitAgain(first)
  }

  /** Whoever is let in for the first time has the next turn, a unit one for all. */
  private run(members: readonly S[]): void {
    const [first] = members
    if (first?.turn === 0) this.turns++
    for (const member of members) member.turn ||= this.turns
    this.running.push(...members)
  }

  /** Others may have made room since whose turn was later. */
  private waitAgain(sequence: S): void {
    const { waiting } = this
    const at = waiting.findIndex(({ turn }) => turn === 0 || turn > sequence.turn)
    waiting.splice(at < 0 ? waiting.length : at, 0, sequence)
  }

  /** Of an image that was on its way nothing is left. */
  private computeAgain(image: Image): void {
    this.imagesLost++
    const at = this.running.findIndex((sequence) => sequence.image === image)
    const sequence = this.running[at] ?? this.waiting.find((waiting) => waiting.image === image)
    const members = membersOf(present(sequence, 'whose image is lost'))
    const first = present(members[0], 'a member')
    for (const member of members) {
      member.image = undefined
      member.slot = -1
    }
    if (at >= 0) {
      this.running.splice(at, members.length)
      this.waitAgain(first)
    }
    first.unit?.restart()
  }
}

/** Its last token is chosen, and only to be taken in. */
function hasAll({ unit, length, lengthMax }: Schedulable): boolean {
  return unit === undefined && length === lengthMax
}

/** A unit runs as a whole or not at all. */
function isStalled({ unit }: Schedulable, stalled: Schedulable['unit']): boolean {
  return unit !== undefined && unit === stalled
}
