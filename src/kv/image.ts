// Owns what sequences that made room leave behind, so that they can go on where they were: which of
// their columns go, and how their slots showed them. Several that go together, such as beams, are
// one image: what they share goes out once, and they share it again when they are back.
//
// Then what all of them have in common lies in one region, and the rest in others than before:
//
//   slot 1  | region 3 ........ | region 5 .. |         | region 8 ........ | region 9 .. |
//   slot 2  | region 3 ......... region 3 ... |   ──▶   | region 8 ......... region 8 ... |

import { type KvLayout, tokenAlignedColumn } from './layout.ts'
import {
  columnsFor,
  fullColumns,
  type KvColumns,
  type KvSpan,
  mergeSpans,
  shareableColumns,
  spannedTokens,
} from './regions.ts'
import type { ShownSlot, SlotTable } from './slots.ts'

export interface Image {
  /** back: all is in memory; lost: a transfer failed, or it was dropped. Its places are free. */
  state: 'leaving' | 'out' | 'coming' | 'back' | 'lost'
  /** Tokens whose keys and values it has, of each sequence. */
  readonly tokens: number
  /** What of them stays in memory, because others use it too; up to a column's end. */
  readonly shared: readonly KvSpan[]
  /** The image itself keeps `shared` in memory; while it is coming, its slots do. */
  pinned: boolean
  readonly parts: ImageParts
  /** One for each column of the pieces, in their order. */
  readonly places: Uint32Array
  /** By sequence, while leaving or coming; else empty. */
  slots: readonly number[]
  /** Pages that will be free when it has left. */
  readonly pages: number
  /** When it began to leave. */
  readonly sinceMs: number
  /** Transfers under way. */
  pending: number
  failed: boolean
  /** Memory was refused for what was coming: the slots that it was to fill are of no use. */
  refused: boolean
  dropped: boolean
}

/** What of some slots goes together. */
export interface ImageParts {
  /** Columns before this one stay in memory. */
  readonly first: number
  /** Columns before this one are the same for all of them. */
  readonly common: number
  /** Where the last of those is; -1 if there are none that go. */
  readonly trunk: number
  /** What goes, each column once. */
  readonly pieces: readonly KvColumns[]
  /** By sequence. */
  readonly shown: readonly ShownSlot[]
}

/** What goes of slots that hold `tokens` tokens each: all that nobody else uses, from the end. */
export function partsOf(table: SlotTable, slots: readonly number[], tokens: number): ImageParts {
  const { layout, regions } = table
  const holds = countHolds(table, slots)
  const contents = slots.map((slot) => table.columnsShown(slot, tokens))
  let first = 0
  for (const columns of contents.flat()) {
    for (let c = Math.max(first, columns.first); c < columns.end; c++) {
      if (regions.liveHolders(columns.region, c) > holds(columns.region, c)) first = c + 1
    }
  }
  // A sequence that goes alone comes back to one region, whatever it shared before.
  const alone = slots.length === 1
  const common = alone ? columnsFor(layout, tokens) : commonColumns(layout, contents)
  // Of those that go together, the first one holds more than it maps, as others shared that with
  // it; what comes back is what is mapped.
  const shown = slots.map((slot) => {
    const now = table.shownBy(slot, tokens)
    return alone ? now : { ...now, beam: true }
  })
  // What stays ends with a column and with a token: none is copied when the rest is back.
  const whole = Math.min(first, common, fullColumns(layout, tokens))
  first = tokenAlignedColumn(layout, whole)
  const trunk = alone
    ? shown[0]?.region
    : contents[0]?.find((part) => part.first < common && part.end >= common)?.region
  return {
    first,
    common,
    trunk: trunk !== undefined && common > first ? trunk : -1,
    pieces: union(contents.flat(), first, common),
    shown,
  }
}

export function columnsIn(pieces: readonly KvColumns[]): number {
  return pieces.reduce((sum, { first, end }) => sum + end - first, 0)
}

/** Pages that it takes to come back for sequences that then have room for `length` tokens each. */
export function pagesBack(layout: KvLayout, image: Image, length: number): number {
  const { parts, places, tokens } = image
  const end = columnsFor(layout, length)
  const more = parts.shown.map(({ pending }) => {
    return end - (pending ? shareableColumns(layout, tokens) : columnsFor(layout, tokens))
  })
  return (places.length + more.reduce((a, b) => a + b, 0)) * layout.ranges
}

/** Of the columns that slots hold from `first` on, those that nobody else uses. */
export function columnsFreed(table: SlotTable, slots: readonly number[], first: number): number {
  const holds = countHolds(table, slots)
  const all = slots.flatMap((slot) => table.columnsHeld(slot))
  let freed = 0
  for (const { region, first: from, end } of union(all, first, first)) {
    for (let c = from; c < end; c++) {
      if (table.regions.liveHolders(region, c) <= holds(region, c)) freed++
    }
  }
  return freed
}

/** By what was where: the regions that an image's pieces and slots come back to. */
export type NewRegions = ReadonlyMap<number, number>

/** The regions, as they were, in whose place others are needed. */
export function regionsOf({ pieces, common, trunk, shown }: ImageParts): Set<number> {
  const later = pieces.filter(({ first }) => first >= common).map(({ region }) => region)
  const all = [...later, ...shown.map(({ region }) => region)]
  return new Set(trunk >= 0 ? [trunk, ...all] : all)
}

/** Where a piece comes back to. */
export function pieceIn(regions: NewRegions, { common, trunk }: ImageParts, piece: KvColumns) {
  return { ...piece, region: regions.get(piece.first < common ? trunk : piece.region) ?? -1 }
}

/** How a slot shows its tokens when the pieces lie in these regions. */
export function shownIn(
  layout: KvLayout,
  regions: NewRegions,
  { first, common, trunk }: ImageParts,
  { spans, region, ...shown }: ShownSlot,
): ShownSlot {
  const own = regions.get(region) ?? -1
  const stayed = tokensBefore(layout, first)
  const inTrunk = Math.max(stayed, tokensBefore(layout, common))
  const moved = spans.flatMap((span) => [
    clip(span, 0, stayed, span.region),
    clip(span, stayed, inTrunk, regions.get(trunk) ?? -1),
    // What has no column to itself goes to the one after it.
    clip(span, inTrunk, Infinity, regions.get(span.region) ?? -1),
  ])
  const list = moved.filter(({ from, to }) => to > from)
  if (shown.pending) return { ...shown, region: own, spans: mergeSpans(layout, list) }
  const to = spannedTokens(spans)
  const whole = mergeSpans(layout, [...list, { region: own, from: to, to }])
  return { ...shown, region: own, spans: whole }
}

function clip({ from, to }: KvSpan, least: number, most: number, region: number): KvSpan {
  return { region, from: Math.max(from, least), to: Math.min(to, most) }
}

/** How often some slots together hold a column. */
function countHolds(
  table: SlotTable,
  slots: readonly number[],
): (region: number, column: number) => number {
  const counts = new Map<number, number[]>()
  for (const { region, first, end } of slots.flatMap((slot) => table.columnsHeld(slot))) {
    const columns = counts.get(region) ?? []
    for (let c = first; c < end; c++) columns[c] = (columns[c] ?? 0) + 1
    counts.set(region, columns)
  }
  return (region, column) => counts.get(region)?.[column] ?? 0
}

/** Up to which column all of these lists, of columns without gaps from 0, are the same. */
function commonColumns(layout: KvLayout, lists: readonly (readonly KvColumns[])[]): number {
  const [one = [], ...others] = lists.map((list) =>
    list.flatMap(({ region, first, end }) => Array.from({ length: end - first }, () => region)),
  )
  const differs = one.findIndex((region, c) => others.some((other) => other[c] !== region))
  return tokenAlignedColumn(layout, differs < 0 ? one.length : differs)
}

/** The columns from `first` on that any of these has, each once; none lies across `cut`. */
function union(list: readonly KvColumns[], first: number, cut: number): KvColumns[] {
  const pieces: KvColumns[] = []
  for (const [region, columns] of Map.groupBy(list, (one) => one.region)) {
    let end = first
    for (const part of columns.toSorted((a, b) => a.first - b.first)) {
      for (let c = Math.max(end, part.first); c < part.end; c++) {
        const last = pieces.at(-1)
        if (last?.region === region && last.end === c && c !== cut) last.end++
        else pieces.push({ region, first: c, end: c + 1 })
      }
      end = Math.max(end, part.end)
    }
  }
  return pieces
}

/** Tokens before a column that begins with one. */
export function tokensBefore(layout: KvLayout, column: number): number {
  return (column * layout.shape.pageBytes) / layout.tokenStride
}
