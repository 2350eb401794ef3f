// Owns the map of KV memory as it is shown: for every page in use who refers to it, how often and
// how lately, and how much of all that is really tokens.

import type { KvEvent, KvHistory } from './history.ts'
import { columnsOf } from './eviction-queue.ts'
import type { PrefixCache } from './prefix.ts'
import { type KvSpan, spannedColumns, spannedTokens } from './regions.ts'
import type { SlotTable } from './slots.ts'

/**
 * live: one sequence refers to it; shared: several do; pinned, cached: only prefixes do; warm: the
 * sequence has ended, and the next one will overwrite it.
 */
export type PageState = 'live' | 'shared' | 'pinned' | 'cached' | 'warm'

/** Columns [first, end) of a region, a page in each of a layout's ranges: all in the same state. */
export interface KvRun {
  region: number
  first: number
  end: number
  state: PageState
  /** Where the bytes are. */
  tier: 'memory'
  /** Ids of the sequences that refer to it. */
  sequences: number[]
  /** Ids of the prefixes that refer to it. */
  prefixes: number[]
  /** Holds on each page, those of pins included. */
  references: number
  /** Since it was last used; 0 while a sequence runs on it. */
  ageMs: number
}

export interface KvPrefix {
  id: number
  tenant: string
  /** Tokens [from, to) of prompts. */
  from: number
  to: number
  uses: number
  ageMs: number
  /** What its eviction is decided by: the lowest goes first. */
  value: number
  pinned: boolean
}

export interface KvMap {
  pageBytes: number
  /** Pages of a column. */
  columnPages: number
  /** Tokens whose bytes fill a column. */
  columnTokens: number
  limitPages: number
  usedPages: number
  /** Of the used pages, how many are in each state. */
  pages: Record<PageState, number>
  /** Bytes of keys and values that someone refers to, copies counted where they lie. */
  tokenBytes: number
  /** 1 − tokenBytes / bytes of the used pages that are not warm; 0 if there are none. */
  fragmentation: number
  runs: KvRun[]
  prefixes: KvPrefix[]
  /** Oldest first; `ageMs` since each. */
  history: (Omit<KvEvent, 'atMs'> & { ageMs: number })[]
  /** Since the start, by kind of event. */
  totals: Record<string, { count: number; bytes: number }>
}

/** A sequence that holds a slot. */
export interface MapSequence {
  id: number
  slot: number
  /** Tokens whose keys and values are in memory. */
  computed: number
}

/** Who holds which columns of a region, and where in a range the last token of theirs ends. */
interface Hold {
  first: number
  end: number
  /** Before it, from its first column on, all bytes are of tokens: its own, or copied ones. */
  toByte: number
  by: 'sequence' | 'warm' | 'pin' | 'prefix'
  id: number
  ageMs: number
}

export function kvMap(
  slots: SlotTable,
  cache: PrefixCache | undefined,
  history: KvHistory,
  sequences: readonly MapSequence[],
  nowMs: number,
): KvMap {
  const { layout } = slots
  const holds = [...slotHolds(slots, sequences, nowMs), ...prefixHolds(slots, cache, nowMs)]
  const byRegion = Map.groupBy(holds, ({ region }) => region)
  const runs = [...byRegion].flatMap(([region, list]) => runsOf(region, list))
  const pages = { live: 0, shared: 0, pinned: 0, cached: 0, warm: 0 }
  for (const { state, first, end } of runs) pages[state] += (end - first) * layout.ranges
  const { pageBytes } = layout.shape
  const rangeBytes = byRegion.values().map((list) => filledBytes(list, pageBytes))
  const tokenBytes = rangeBytes.reduce((a, b) => a + b, 0) * layout.ranges
  const heldBytes = (slots.usedPages - pages.warm) * pageBytes
  return {
    pageBytes,
    columnPages: layout.ranges,
    columnTokens: pageBytes / layout.tokenStride,
    limitPages: slots.limitPages,
    usedPages: slots.usedPages,
    pages,
    tokenBytes,
    fragmentation: heldBytes > 0 ? 1 - tokenBytes / heldBytes : 0,
    runs: runs.toSorted((a, b) => a.region - b.region || a.first - b.first),
    prefixes: [...(cache?.nodes() ?? [])].map((node) => ({
      id: node.id,
      tenant: node.tenant,
      from: node.from,
      to: node.from + node.tokens.length,
      uses: node.uses,
      ageMs: nowMs - node.usedMs,
      value: node.value,
      pinned: node.pins > 0,
    })),
    history: history.events().map(({ atMs, ...event }) => ({ ...event, ageMs: nowMs - atMs })),
    totals: Object.fromEntries(history.totals),
  }
}

type RegionHold = Hold & { region: number }

function* slotHolds(
  slots: SlotTable,
  sequences: readonly MapSequence[],
  nowMs: number,
): Generator<RegionHold> {
  const bySlot = new Map(sequences.map((sequence) => [sequence.slot, sequence]))
  const { layout } = slots
  for (const { slot, sinceMs, region, first, end, shared } of slots.inUse()) {
    const sequence = bySlot.get(slot)
    if (!sequence) {
      // Aborted ones are due at once; the time of their end is not kept.
      const ageMs = Number.isFinite(sinceMs) ? nowMs - sinceMs : 0
      yield { region, first, end, toByte: 0, by: 'warm', id: slot, ageMs }
      continue
    }
    const owner = { by: 'sequence', id: sequence.id, ageMs: 0 } as const
    yield* spanHolds(slots, shared, owner)
    const toByte = Math.max(sequence.computed, spannedTokens(shared)) * layout.tokenStride
    if (end > first) yield { region, first, end, toByte, ...owner }
  }
}

function* prefixHolds(
  slots: SlotTable,
  cache: PrefixCache | undefined,
  nowMs: number,
): Generator<RegionHold> {
  if (!cache) return
  const { tokenStride } = slots.layout
  for (const node of cache.nodes()) {
    const columns = columnsOf(slots.regions, node)
    const toByte = (node.from + node.tokens.length) * tokenStride
    const ageMs = nowMs - node.usedMs
    yield { ...columns, toByte, by: 'prefix', id: node.id, ageMs }
  }
  for (const { spans } of cache.pins.list) {
    yield* spanHolds(slots, spans, { by: 'pin', id: 0, ageMs: Infinity })
  }
}

function* spanHolds(
  { layout }: SlotTable,
  spans: readonly KvSpan[],
  owner: Pick<Hold, 'by' | 'id' | 'ageMs'>,
): Generator<RegionHold> {
  for (const span of spans) {
    const toByte = span.to * layout.tokenStride
    for (const columns of spannedColumns(layout, [span])) yield { ...columns, toByte, ...owner }
  }
}

/** Cuts a region's columns where a hold begins or ends; between two cuts all are alike. */
function runsOf(region: number, holds: readonly Hold[]): KvRun[] {
  const cuts = [...new Set(holds.flatMap(({ first, end }) => [first, end]))].toSorted(
    (a, b) => a - b,
  )
  return cuts.slice(0, -1).flatMap((first, i) => {
    const end = cuts[i + 1] ?? first
    const here = holds.filter((hold) => hold.first <= first && hold.end >= end)
    if (here.length === 0) return []
    const idsOf = (by: Hold['by']) => [
      ...new Set(here.filter((hold) => hold.by === by).map(({ id }) => id)),
    ]
    const sequences = idsOf('sequence')
    const state = stateOf(sequences.length, here)
    const prefixes = idsOf('prefix')
    const ageMs = Math.min(...here.map((hold) => hold.ageMs))
    const references = here.length
    return { region, first, end, state, tier: 'memory', sequences, prefixes, references, ageMs }
  })
}

function stateOf(sequences: number, holds: readonly Hold[]): PageState {
  if (sequences > 1) return 'shared'
  if (sequences === 1) return 'live'
  if (holds.some(({ by }) => by === 'pin')) return 'pinned'
  return holds.some(({ by }) => by === 'warm') ? 'warm' : 'cached'
}

/** Bytes of a range that lie in a token somebody refers to, each once. */
function filledBytes(holds: readonly Hold[], pageBytes: number): number {
  let [filled, reached] = [0, 0]
  for (const { first, toByte } of holds.toSorted((a, b) => a.first - b.first)) {
    filled += Math.max(0, toByte - Math.max(first * pageBytes, reached))
    reached = Math.max(reached, toByte)
  }
  return filled
}
