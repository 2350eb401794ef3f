// Owns what happens when memory that was free is another process's by now, as can be on a GPU:
// whoever was promised it waits to be computed again, the limit falls to what there is and rises
// when there is more. Nobody else notices; who waits in vain is told so.

import { present } from '../assert.ts'
import type { KvMemory } from '../backends/backend.ts'
import { LatticeError } from '../errors.ts'
import type { SlotTable } from '../kv/slots.ts'
import { warn } from '../log.ts'
import type { ScheduledPart, Scheduler } from '../scheduler/scheduler.ts'
import type { Sequence } from './sequence.ts'

/** How often to look whether there is more memory, while there is too little. */
const LOOK_MS = 200

/** With nothing that runs, the first of the queue waits so long for others to give memory back. */
const PATIENCE_MS = 10_000

type Contended = NonNullable<KvMemory['contended']>

export class Shortage {
  private readonly memory: Contended
  private readonly slots: SlotTable
  private readonly scheduler: Scheduler<Sequence>
  private readonly askedPages: number
  private lookedMs = -Infinity
  private idleSinceMs: number | undefined

  constructor(memory: Contended, slots: SlotTable, scheduler: Scheduler<Sequence>) {
    this.memory = memory
    this.slots = slots
    this.scheduler = scheduler
    this.askedPages = slots.limitPages
  }

  private get short(): boolean {
    return this.slots.limitPages < this.askedPages
  }

  /** Of a planned step, the parts whose memory is there; the sequences of others make way. */
  sift(parts: readonly ScheduledPart<Sequence>[]): readonly ScheduledPart<Sequence>[] {
    const lacking = this.memory.lacking()
    if (lacking.size === 0) return parts
    // The last first: so the queue keeps their order.
    for (const sequence of this.scheduler.running.toReversed()) {
      if (sequence.slot < 0) continue
      const held = this.slots.columnsHeld(sequence.slot)
      if (held.some(({ region }) => lacking.has(region))) this.scheduler.giveWay(sequence)
    }
    while (this.slots.reclaim(-Infinity) >= 0);
    // What was moved to make room, and had nowhere to go: nobody knows whose it was.
    if (this.memory.holdsLacking) throw memoryTaken()
    if (!this.short) warn('another process has taken GPU memory: KV makes do with what is left')
    this.limit(this.memory.obtainablePages(0))
    return parts.filter(({ sequence }) => sequence.slot >= 0)
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
    if (pages > this.slots.limitPages) this.limit(Math.min(pages, this.askedPages))
    return LOOK_MS
  }

  /** Who is first in the queue, if nothing has run for a while because memory is another's. */
  hopeless(nowMs: number): Sequence | undefined {
    const { running, waiting } = this.scheduler
    if (!this.short || running.length > 0 || waiting.length === 0) {
      this.idleSinceMs = undefined
      return undefined
    }
    this.idleSinceMs ??= nowMs
    if (nowMs - this.idleSinceMs < PATIENCE_MS) return undefined
    return present(waiting[0], 'who waits')
  }

  private limit(pages: number): void {
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
