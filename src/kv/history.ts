// Owns what lately happened to KV memory: the last events, each with its time, count and bytes, and
// totals since the start. Events of a kind that follow each other closely are one.

import { type KvLayout } from './layout.ts'
import { type KvMover, type KvSpan, shareableColumns, spannedTokens } from './regions.ts'

/**
 * fork: a slot begins with others' pages, so many bytes of which it shares; copy: what it copied of
 * pages that it cannot share; evict: cached prefixes were forgotten; preempt: a sequence had to
 * make room, and its pages went.
 *
 * Between memory and disk: offload: columns were written, reload: read back; demote: cached
 * prefixes went from memory and are on disk; fault: pages were touched while they were on their
 * way; lost: columns could not be written or did not come back as they went.
 */
export type KvEventKind =
  | 'fork'
  | 'copy'
  | 'evict'
  | 'preempt'
  | 'offload'
  | 'reload'
  | 'demote'
  | 'fault'
  | 'lost'

export interface KvEvent {
  kind: KvEventKind
  /** When the first of it happened, by the clock that the history was given. */
  atMs: number
  count: number
  bytes: number
}

/** Events that are kept; some minutes' worth on a busy server. */
const EVENTS_MAX = 256

/** Within this time of its first, events of a kind are one: a step's worth, or several. */
const TOGETHER_MS = 100

export class KvHistory {
  readonly totals = new Map<KvEventKind, { count: number; bytes: number }>()
  private readonly now: () => number
  private readonly ring: KvEvent[] = []
  private next = 0

  /** @param now milliseconds that never go back */
  constructor(now: () => number) {
    this.now = now
  }

  add(kind: KvEventKind, bytes: number, count = 1): void {
    const total = this.totals.get(kind) ?? { count: 0, bytes: 0 }
    total.count += count
    total.bytes += bytes
    this.totals.set(kind, total)
    const atMs = this.now()
    const same = this.latest(kind)
    if (same && atMs - same.atMs < TOGETHER_MS) {
      same.count += count
      same.bytes += bytes
      return
    }
    this.ring[this.next] = { kind, atMs, count, bytes }
    this.next = (this.next + 1) % EVENTS_MAX
  }

  /** Oldest first. */
  events(): KvEvent[] {
    return [...this.ring.slice(this.next), ...this.ring.slice(0, this.next)]
  }

  /** The last event of a kind, if it is one of the last few: kinds alternate within a step. */
  private latest(kind: KvEventKind): KvEvent | undefined {
    for (let back = 1; back <= 9; back++) {
      const event = this.ring[(this.next - back + EVENTS_MAX) % EVENTS_MAX]
      if (event?.kind === kind) return event
    }
    return undefined
  }
}

/** The mover, with forks and copies written into the history. */
export function watched(mover: KvMover, layout: KvLayout, history: KvHistory): KvMover {
  return {
    inPlace: mover.inPlace ?? false,
    map(slot: number, region: number, shared: readonly KvSpan[]): void {
      mover.map(slot, region, shared)
      const tokens = spannedTokens(shared)
      if (tokens === 0) return
      const { pageBytes } = layout.shape
      const whole = shareableColumns(layout, tokens) * pageBytes
      history.add('fork', whole * layout.ranges)
    },
    copy(slot: number, first: number, shared: readonly KvSpan[]): void {
      mover.copy(slot, first, shared)
      const from = first * layout.shape.pageBytes
      history.add('copy', (spannedTokens(shared) * layout.tokenStride - from) * layout.ranges)
    },
    discard: (region, first, end) => mover.discard(region, first, end),
    grow: (region, first, end) => mover.grow?.(region, first, end),
    ...(mover.expect && { expect: mover.expect.bind(mover) }),
    unshare: (region) => mover.unshare?.(region),
  }
}
