// Owns what is on its way to a tier or back: a record for each ticket, and who is told at its end.

import { present } from '../assert.ts'
import type { LatticeError } from '../errors.ts'
import type { Level } from './outside.ts'
import { PlaceTable } from './places.ts'
import type { KvColumns } from './regions.ts'
import type { KvTier, TierLevels } from './tier.ts'

export type TransferKind = 'save' | 'load'

export interface EndedTransfer {
  kind: TransferKind
  columns: number
  /** Of them, those from the slower level of two. */
  below: number
  ms: number
  failed: boolean
}

interface Transfer {
  kind: TransferKind
  columns: number
  sinceMs: number
  onEnd: (error: LatticeError | undefined) => void
}

export class Transfers {
  readonly places: PlaceTable
  /** Told of every transfer that ended; set by whoever counts them. */
  onEnded: (ended: EndedTransfer) => void = () => {}
  /** Told how many pages were touched on their way, if any, since the last poll. */
  onFaults: (count: number) => void = () => {}
  private readonly tier: KvTier
  /** At the last poll. */
  nowMs = 0
  private faultsTold = 0
  private readonly tickets = new Map<number, Transfer>()
  /** Tickets that move nothing. */
  private readonly others = new Map<number, Transfer['onEnd']>()

  constructor(tier: KvTier) {
    this.tier = tier
    this.places = new PlaceTable(tier.capacity)
    if (tier.forget) this.places.onFree = (place) => tier.forget?.(place)
  }

  /** Something is under way: `poll` will have news. */
  get busy(): boolean {
    return this.tickets.size > 0 || this.others.size > 0
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

  get faults(): number {
    return this.tier.faults ?? 0
  }

  /** Of these places, how many lie in the slower level of two. */
  below(places: Uint32Array): number {
    const { tier } = this
    return tier.isBelow ? places.reduce((sum, at) => sum + (tier.isBelow?.(at) ? 1 : 0), 0) : 0
  }

  levelOf(place: number): Level {
    return this.tier.isBelow && !this.tier.isBelow(place) ? 'host' : 'disk'
  }

  get levels(): TierLevels | undefined {
    return this.tier.levels
  }

  /** The encrypted file, or its directory if it has no name. */
  get path(): string | undefined {
    return this.tier.path
  }

  /** Tells when a ticket ends that somebody else has begun. */
  follow(ticket: number, onEnd: Transfer['onEnd']): void {
    this.others.set(ticket, onEnd)
  }

  /**
   * Tells those whose transfers have ended.
   * @throws LatticeError `pager_failed`
   */
  poll(nowMs: number): void {
    this.nowMs = nowMs
    this.tier.check()
    for (const { ticket, error, ms, below = 0 } of this.tier.poll()) {
      const other = this.others.get(ticket)
      if (other) {
        this.others.delete(ticket)
        other(error)
        continue
      }
      const { kind, columns, sinceMs, onEnd } = present(this.tickets.get(ticket), 'a transfer')
      this.tickets.delete(ticket)
      const failed = error !== undefined
      this.onEnded({ kind, columns, below, ms: ms ?? nowMs - sinceMs, failed })
      onEnd(error)
    }
    const { faults } = this
    if (faults > this.faultsTold) this.onFaults(faults - this.faultsTold)
    this.faultsTold = faults
  }
}
