// Owns the map of KV memory as it is shown: for every page in use who refers to it, how often and
// how lately, and how much of all that is really tokens.

import type { KvEvent, KvHistory } from './history.ts'
import { columnsOf } from './eviction-queue.ts'
import type { KvLayout } from './layout.ts'
import { type KvOutside, type Level, type Outside, outsideMap } from './outside.ts'
import type { PrefixCache } from './prefix.ts'
import type { PrefixNode } from './prefix-node.ts'
import { type KvColumns, type KvSpan, spannedColumns, spannedTokens } from './regions.ts'
import type { SlotTable } from './slots.ts'
import type { Image } from './image.ts'

/**
 * live: one sequence refers to it; shared: several do; pinned, cached: only prefixes do; warm: the
 * sequence has ended, and the next one will overwrite it; moving: nobody uses it while it is
 * written to disk or read from there.
 */
export type PageState = 'live' | 'shared' | 'pinned' | 'cached' | 'warm' | 'moving'

/** Columns [first, end) of a region, a page in each of a layout's ranges: all in the same state. */
export interface KvRun {
  region: number
  first: number
  end: number
  state: PageState
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
  tier: 'memory' | Level | 'both'
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
  /** Absent if there is no memory but the one. */
  disk?: KvOutside
  prefixes: KvPrefix[]
  /** Oldest first; `ageMs` since each. */
  history: (Omit<KvEvent, 'atMs'> & { ageMs: number })[]
  /** Since the start, by kind of event. */
  totals: Record<string, { count: number; bytes: number }>
}

/** A sequence that runs, or waits. */
export interface MapSequence {
  id: number
  /** -1: none. */
  slot: number
  /** Tokens whose keys and values are in memory. */
  computed: number
  /** What it has outside of memory, or on the way. */
  image?: Image | undefined
}

/** Who holds which columns of a region, and where in a range the last token of theirs ends. */
interface Hold {
  first: number
  end: number
  /** Before it, from its first column on, all bytes are of tokens: its own, or copied ones. */
  toByte: number
  /** transfer: it is held so that nothing changes under what is on its way. */
  by: 'sequence' | 'warm' | 'pin' | 'prefix' | 'transfer'
  id: number
  ageMs: number
  /** It is on its way to disk or from there. */
  moving: boolean
}

export function kvMap(
  slots: SlotTable,
  cache: PrefixCache | undefined,
  history: KvHistory,
  sequences: readonly MapSequence[],
  nowMs: number,
  outside?: Outside,
): KvMap {
  const { layout } = slots
  const holds = [
    ...slotHolds(slots, sequences, outside, nowMs),
    ...prefixHolds(slots, cache, outside, nowMs),
  ]
  const byRegion = Map.groupBy(holds, ({ region }) => region)
  const runs = [...byRegion].flatMap(([region, list]) => runsOf(region, list))
  const pages = { live: 0, shared: 0, pinned: 0, cached: 0, warm: 0, moving: 0 }
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
    ...(outside && { disk: outsideMap(outside, cache, sequences, layout.ranges, nowMs) }),
    prefixes: [...(cache?.nodes() ?? [])].map((node) => ({
      id: node.id,
      tenant: node.tenant,
      from: node.from,
      to: node.from + node.tokens.length,
      uses: node.uses,
      ageMs: nowMs - node.usedMs,
      value: node.value,
      pinned: node.pins > 0,
      tier: tierOf(node, outside),
    })),
    history: history.events().map(({ atMs, ...event }) => ({ ...event, ageMs: nowMs - atMs })),
    totals: Object.fromEntries(history.totals),
  }
}

function tierOf({ region, places }: PrefixNode, outside: Outside | undefined): KvPrefix['tier'] {
  if (region >= 0) return places ? 'both' : 'memory'
  return places?.every((place) => outside?.levelOf(place) === 'host') ? 'host' : 'disk'
}

type RegionHold = Hold & { region: number }

function* slotHolds(
  slots: SlotTable,
  sequences: readonly MapSequence[],
  outside: Outside | undefined,
  nowMs: number,
): Generator<RegionHold> {
  const bySlot = new Map(sequences.map((sequence) => [sequence.slot, sequence]))
  const byImage = new Map(sequences.map((sequence) => [sequence.image, sequence]))
  const imageOf = new Map(
    [...(outside?.images ?? [])].flatMap((image) => image.slots.map((slot) => [slot, image])),
  )
  const { tokenStride } = slots.layout
  for (const used of slots.inUse()) {
    const { slot, state, region, first, end, held, spans, pending } = used
    const own = { region, first, end }
    if (state === 'warm') {
      // Aborted ones are due at once; the time of their end is not kept.
      const ageMs = Number.isFinite(used.sinceMs) ? nowMs - used.sinceMs : 0
      yield { ...own, toByte: 0, by: 'warm', id: slot, ageMs, moving: false }
      continue
    }
    const image = imageOf.get(slot)
    const sequence = image ? byImage.get(image) : bySlot.get(slot)
    const owner = ownerOf(sequence, image ? nowMs - image.sinceMs : 0)
    const leaves = image?.state === 'leaving'
    for (const columns of held) {
      const toByte = filledTo(slots.layout, columns, spans)
      yield { ...columns, toByte, ...owner, moving: leaves }
    }
    const computed = Math.max(image?.tokens ?? sequence?.computed ?? 0, spannedTokens(spans))
    const toByte = pending ? 0 : computed * tokenStride
    if (end > first) yield { ...own, toByte, ...owner, moving: image !== undefined }
  }
  for (const image of outside?.images ?? []) {
    if (!image.pinned) continue
    const owner = ownerOf(byImage.get(image), nowMs - image.sinceMs)
    yield* spanHolds(slots, image.shared, { ...owner, moving: false })
  }
}

/** Who has no sequence any more waits for a transfer's end only. */
function ownerOf(sequence: MapSequence | undefined, ageMs: number) {
  if (!sequence) return { by: 'transfer', id: 0, ageMs } as const
  return { by: 'sequence', id: sequence.id, ageMs } as const
}

/** Where the tokens of spans end in columns that are held for them. */
function filledTo(layout: KvLayout, columns: KvColumns, spans: readonly KvSpan[]): number {
  const { tokenStride, shape } = layout
  const from = columns.first * shape.pageBytes
  const ends = spans
    .filter(({ region, to }) => region === columns.region && to * tokenStride > from)
    .map(({ to }) => to * tokenStride)
  return Math.min(columns.end * shape.pageBytes, ...ends)
}

function* prefixHolds(
  slots: SlotTable,
  cache: PrefixCache | undefined,
  outside: Outside | undefined,
  nowMs: number,
): Generator<RegionHold> {
  if (!cache) return
  const { tokenStride } = slots.layout
  for (const node of cache.nodes()) {
    if (node.region < 0) continue
    const columns = columnsOf(slots.regions, node)
    const toByte = (node.from + node.tokens.length) * tokenStride
    const ageMs = nowMs - node.usedMs
    yield { ...columns, toByte, by: 'prefix', id: node.id, ageMs, moving: node.coming }
  }
  for (const { spans } of cache.pins.list) {
    yield* spanHolds(slots, spans, { by: 'pin', id: 0, ageMs: Infinity, moving: false })
  }
  for (const [columns, places] of outside?.moving ?? []) {
    const moving = places !== undefined
    yield { ...columns, toByte: 0, by: 'transfer', id: 0, ageMs: Infinity, moving }
  }
}

function* spanHolds(
  { layout }: SlotTable,
  spans: readonly KvSpan[],
  owner: Pick<Hold, 'by' | 'id' | 'ageMs' | 'moving'>,
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
    const latestMs = Math.min(...here.map((hold) => hold.ageMs))
    const ageMs = Number.isFinite(latestMs) ? latestMs : 0
    const references = here.length
    return { region, first, end, state, tier: 'memory', sequences, prefixes, references, ageMs }
  })
}

function stateOf(sequences: number, holds: readonly Hold[]): PageState {
  if (sequences > 1) return 'shared'
  if (holds.some(({ by, moving }) => by === 'sequence' && !moving)) return 'live'
  if (holds.some(({ by }) => by === 'pin')) return 'pinned'
  if (holds.some(({ moving }) => moving)) return 'moving'
  if (holds.some(({ by }) => by === 'warm')) return 'warm'
  // What leads to a prefix that is read may have been forgotten meanwhile.
  return holds.some(({ by }) => by === 'prefix') ? 'cached' : 'moving'
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
