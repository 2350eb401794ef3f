// Owns what is on its way to a tier or back: a record for each ticket, and who is told at its end.

import { present } from '../assert.ts'
import type { LatticeError } from '../errors.ts'
import { PlaceTable } from './places.ts'
import type { KvColumns } from './regions.ts'
import type { KvTier } from './tier.ts'

export type TransferKind = 'save' | 'load'

interface Transfer {
  kind: TransferKind | 'keep'
  columns: number
  sinceMs: number
  onEnd: (error: LatticeError | undefined) => void
}

export class Transfers {
  readonly places: PlaceTable
  /** Told of every transfer that did not fail; set by whoever counts them. */
  onMoved: (kind: TransferKind, columns: number, ms: number) => void = () => {}
  private readonly tier: KvTier
  /** At the last poll. */
  private nowMs = 0
  private readonly tickets = new Map<number, Transfer>()

  constructor(tier: KvTier) {
    this.tier = tier
    this.places = new PlaceTable(tier.capacity)
  }

  /** Something is under way: `poll` will have news. */
  get busy(): boolean {
    return this.tickets.size > 0
  }

  /** Waits for a ticket that somebody else began. */
  await(ticket: number, onEnd: Transfer['onEnd']): void {
    this.tickets.set(ticket, { kind: 'keep', columns: 0, sinceMs: this.nowMs, onEnd })
  }

  /** @param places one for each column, in order */
  begin(
    kind: TransferKind,
    columns: KvColumns,
    places: Uint32Array,
    onEnd: Transfer['onEnd'],
  ): void {
    const ticket = this.tier[kind](columns, places)
    this.tickets.set(ticket, { kind, columns: places.length, sinceMs: this.nowMs, onEnd })
  }

  /**
   * Tells those whose transfers have ended.
   * @throws LatticeError `pager_failed`
   */
  poll(nowMs: number): void {
    this.nowMs = nowMs
    this.tier.check()
    for (const { ticket, error } of this.tier.poll()) {
      const { kind, columns, sinceMs, onEnd } = present(this.tickets.get(ticket), 'a transfer')
      this.tickets.delete(ticket)
      if (!error && kind !== 'keep') this.onMoved(kind, columns, nowMs - sinceMs)
      onEnd(error)
    }
  }
}
