// Owns what happens when memory that was free is another process's by now, as can be on a GPU:
// whoever was promised it waits to be computed or brought back again, the limit falls to what there
// is and rises when there is more. Nobody else notices; who waits in vain is told so.

import { present } from '../assert.ts'
import type { KvMemory } from '../backends/backend.ts'
import { LatticeError } from '../errors.ts'
import { overlapAny } from '../kv/regions.ts'
import type { SlotTable } from '../kv/slots.ts'
import { warn } from '../log.ts'
import type { ScheduledPart, Scheduler } from '../scheduler/scheduler.ts'
import type { Offload } from './offload.ts'
import type { Sequence } from './sequence.ts'

/** How often to look whether there is more memory, while there is too little. */
const LOOK_MS = 200

/** Whoever takes memory and gives it back all the time is spoken of now and then. */
const WARN_MS = 60_000

/** With nothing that runs, the first of the queue waits so long for others to give memory back. */
const PATIENCE_MS = 10_000

type Contended = NonNullable<KvMemory['contended']>

export class Shortage {
  private readonly memory: Contended
  private readonly slots: SlotTable
  private readonly scheduler: Scheduler<Sequence>
  private readonly offload: Offload | undefined
  private readonly askedPages: number
  /** That there are; the limit is higher while somebody still holds more than that. */
  private pages: number
  private lookedMs = -Infinity
  private warnedMs = -Infinity
  private idleSinceMs: number | undefined

  constructor(
    memory: Contended,
    slots: SlotTable,
    scheduler: Scheduler<Sequence>,
    offload: Offload | undefined,
  ) {
    this.memory = memory
    this.slots = slots
    this.scheduler = scheduler
    this.offload = offload
    this.askedPages = slots.limitPages
    this.pages = slots.limitPages
  }

  /** There is less memory than was asked for. */
  get short(): boolean {
    return this.slots.limitPages < this.askedPages
  }

  /** Of a planned step, the parts whose memory is there; the sequences of others make way. */
  sift(
    parts: readonly ScheduledPart<Sequence>[],
    nowMs: number,
  ): readonly ScheduledPart<Sequence>[] {
    const sifted = this.notice(nowMs) ? parts.filter(({ sequence }) => sequence.slot >= 0) : parts
    if (sifted.length > 0) this.idleSinceMs = undefined
    return sifted
  }

  /**
   * Hears what memory was refused. What is being brought back there must not be believed to have
   * come: so this is before anybody asks what has.
   * @returns whether any was
   */
  notice(nowMs: number): boolean {
    const lacking = this.memory.lacking()
    if (lacking.length === 0) return false
    // The last first: so the queue keeps their order.
    for (const sequence of this.scheduler.running.toReversed()) {
      if (sequence.slot < 0) continue
      if (!overlapAny(this.slots.columnsHeld(sequence.slot), lacking)) continue
      this.scheduler.giveWay(sequence)
    }
    // Beams that grew in part have made room for others since: what they left behind is of no use.
    while (this.slots.reclaim(-Infinity) >= 0);
    this.offload?.tiers.undo(lacking)
    for (const { region } of lacking) this.offload?.cold?.undo(region)
    this.limit(this.memory.obtainablePages(0))
    if (nowMs - this.warnedMs > WARN_MS) {
      warn('another process has taken GPU memory: KV makes do with what is left')
      this.warnedMs = nowMs
    }
    return true
  }

  /**
   * The limit was held up by those who held more than there is; some may have let go. This is after
   * they were asked, and before anybody is let in: else there seems to be room where there is none,
   * step after step.
   */
  letGo(): void {
    if (this.slots.limitPages <= this.pages) return
    // What there was for them may have been found.
    this.limit(Math.max(this.pages, this.memory.obtainablePages(0)))
  }

  /**
   * Looks now and then whether there is more memory.
   * @returns milliseconds until it wants to look again, undefined if all is there
   */
  look(nowMs: number): number | undefined {
    if (!this.short) return undefined
    const waitMs = this.lookedMs + LOOK_MS - nowMs
    if (waitMs > 0) return waitMs
    this.lookedMs = nowMs
    const pages = this.memory.obtainablePages(Infinity)
    if (pages > this.pages) this.limit(Math.min(pages, this.askedPages))
    return LOOK_MS
  }

  /** Who is first in the queue, if nothing could run for a while because memory is another's. */
  hopeless(nowMs: number): Sequence | undefined {
    const { running, waiting } = this.scheduler
    if (!this.short || waiting.length === 0) this.idleSinceMs = undefined
    // What is on its way may run yet.
    if (!this.short || waiting.length === 0 || running.length > 0) return undefined
    this.idleSinceMs ??= nowMs
    const first = present(waiting[0], 'who waits')
    const waitedMs = nowMs - Math.max(this.idleSinceMs, first.arrivedMs)
    return waitedMs < PATIENCE_MS ? undefined : first
  }

  private limit(pages: number): void {
    this.pages = pages
    this.slots.regions.limitPages = Math.max(pages, this.slots.usedPages)
    this.memory.limit(this.slots.limitPages)
  }
}

/** What who waits in vain is told. */
export function memoryTaken(): LatticeError {
  return new LatticeError('gpu_memory_taken', 'Other processes have the memory that this needs.', {
    todo: 'Retry later; `nvidia-smi` shows who has it. A smaller --kv-memory leaves it to them.',
  })
}
