// Owns what the core is made of where memory is concerned: regions, slots, the prefix cache, the
// tiers behind them, and who tells what of it.

import type { Backend, KvMemory } from '../backends/backend.ts'
import { EVICTION_DEFAULT } from '../kv/eviction.ts'
import { KvHistory, watched } from '../kv/history.ts'
import { PrefixCache } from '../kv/prefix.ts'
import { RegionTable } from '../kv/regions.ts'
import { SlotTable } from '../kv/slots.ts'
import { Transfers } from '../kv/transfers.ts'
import { KV_MAPPINGS_MAX } from '../limits.ts'
import { Costs } from '../scheduler/costs.ts'
import type { CoreOptions } from './core-contract.ts'
import { Offload } from './offload.ts'
import { Sessions } from './sessions.ts'
import { PromptSharing } from './sharing.ts'
import type { Shortage } from './shortage.ts'

/**
 * How long the pages of an ended sequence wait for one that overwrites them. Longer than the gap
 * between a client's requests in a closed loop; short, because idle memory must be back with the
 * kernel within 100 ms and the kernel takes 50 ms a GiB.
 */
const WARM_MS = 20

/** An idle engine keeps no more than this warm; the rest goes back at once. */
const WARM_IDLE_BYTES = 64 << 20

export interface EngineMemory {
  slots: SlotTable
  history: KvHistory
  costs: Costs
  offload: Offload | undefined
  sessions: Sessions | undefined
  sharing: PromptSharing
  /** Regions besides its own that a slot's tokens may lie in. */
  spansMax: number
}

export function engineMemory(
  backend: Backend,
  options: CoreOptions,
  now: () => number,
): EngineMemory {
  const { kv, chunkTokensMin } = backend
  const { pageBytes } = kv.layout.shape
  const history = new KvHistory(now)
  const mover = watched(kv, kv.layout, history)
  const regions = new RegionTable(kv.layout, kv.regions, options.kvPages, mover)
  const slots = new SlotTable(regions, kv.slots)
  const spansMax = Math.max(1, Math.floor(KV_MAPPINGS_MAX / (kv.slots * kv.layout.ranges)) - 1)
  const { prefixPages, prefixEviction: eviction = EVICTION_DEFAULT } = options
  const onGone = (kind: 'evict' | 'demote', pages: number): void =>
    history.add(kind, pages * pageBytes)
  const transfers = kv.tier && new Transfers(kv.tier)
  const places = transfers && { places: transfers.places }
  const cache = prefixPages
    ? new PrefixCache(regions, prefixPages, { eviction, now, onGone, ...places })
    : undefined
  const costs = new Costs(pageBytes, kv.tier?.guess)
  const offload =
    transfers && new Offload(transfers, slots, cache, costs, options, history, kv.tier?.store)
  const sessions = cache && new Sessions(slots, cache, offload)
  const sharing = new PromptSharing(slots, cache, offload, {
    output: options.prefixOutput ?? false,
    onPreempt: (pages) => history.add('preempt', pages * pageBytes),
    computeMin: Math.max(1, chunkTokensMin),
    spansMax,
  })
  return { slots, history, costs, offload, sessions, sharing, spansMax }
}

/**
 * Gives back pages of sequences that ended, slot by slot.
 * @returns milliseconds until there is more to give back, or undefined if there is nothing
 */
export function giveBack(
  slots: SlotTable,
  kv: KvMemory,
  idle: boolean,
  nowMs: number,
  shortage?: Shortage,
): number | undefined {
  if (idle && slots.warmPages * kv.layout.shape.pageBytes > WARM_IDLE_BYTES) {
    slots.reclaim(Infinity)
    return 0
  }
  releaseOverdue(slots, nowMs)
  const { warmSinceMs } = slots
  const warm = warmSinceMs === undefined ? Infinity : warmSinceMs + WARM_MS - nowMs
  // With nobody there, it looks when somebody comes.
  const short = idle ? undefined : shortage?.look(nowMs)
  const wait = Math.min(warm, kv.settle?.(nowMs) ?? Infinity, short ?? Infinity)
  return wait === Infinity ? undefined : Math.max(0, wait)
}

/** Gives back the pages of all aborted sequences, and of one that ended a while ago. */
export function releaseOverdue(slots: SlotTable, nowMs: number): void {
  while (slots.reclaim(-Infinity) >= 0);
  slots.reclaim(nowMs - WARM_MS)
}
