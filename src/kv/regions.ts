// Owns how often each physical page of KV is referred to. Memory is a row of regions, each as
// large as a slot; the KV of position p lies at p's own place in whichever region holds it, so any
// region's pages can be mapped into any slot. A column is one page in each of a region's ranges.
//
//   region 3  | 0 1 2 3 4 5 . . |    a parent's: columns 0–3 are its forks' too
//   region 7  | . . . . 4 5 6 . |    a fork's own, from its boundary column on
//
// A column that nobody refers to is given back at once; one that is referred to counts once,
// however many share it: that is the account that `--kv-memory` limits.

import { assert, present } from '../assert.ts'
import { PREFIX_REGIONS } from '../limits.ts'
import { type KvLayout, pagesFor } from './layout.ts'

/** Tokens [from, to) of a sequence have their keys and values in `region`. */
export interface KvSpan {
  region: number
  from: number
  to: number
}

/** Columns [first, end) of a region. */
export interface KvColumns {
  region: number
  first: number
  end: number
}

/** Whoever moves the memory that is accounted for here. */
export interface KvMover {
  /**
   * A slot shows its region where that lies, and nowhere else: what others hold of it must not be
   * covered by what is mapped there.
   */
  readonly inPlace?: boolean
  /**
   * Lets a slot's tokens be those of `shared`, which begin at 0 without gaps, and everything from
   * there on lie in `region`. Whole groups of columns are shared; what the shared tokens have of
   * the group after them is nobody's to read until `copy`. Whatever was mapped there before is no
   * longer.
   */
  map(slot: number, region: number, shared: readonly KvSpan[]): void
  /**
   * Makes the columns of a mapped slot from `first` on its own: what the tokens of `shared` have of
   * them is copied into its region.
   */
  copy(slot: number, first: number, shared: readonly KvSpan[]): void
  /** Gives pages back; what they held is lost. They are written before they are read again. */
  discard(region: number, first: number, end: number): void
  /**
   * Columns [first, end) of a region will be written from the next step on. Memory that the kernel
   * fills in at the first touch need not be told.
   */
  grow?(region: number, first: number, end: number): void
  /** They are likely to be needed soon: a hint, which nothing accounts for. */
  expect?(region: number, first: number, end: number): void
  /** Nobody reads any more what was mapped into a region from others. */
  unshare?(region: number): void
}

/**
 * Regions for this many slots: each slot's own, as many whose writer ended before its forks did,
 * and those of cached prefixes.
 */
export function regionsFor(slots: number): number {
  return 2 * slots + PREFIX_REGIONS
}

/** live: a sequence that runs, or a slot that keeps its pages warm; cache: a cached prefix. */
export type Holder = 'live' | 'cache'

export function pagesOf(layout: KvLayout, { first, end }: KvColumns): number {
  return (end - first) * layout.ranges
}

/** Columns whose every byte lies before token `tokens`. */
export function fullColumns(layout: KvLayout, tokens: number): number {
  return Math.floor((tokens * layout.tokenStride) / layout.shape.pageBytes)
}

/** Columns of the first `tokens` tokens that can be shared: full ones, in whole groups. */
export function shareableColumns(layout: KvLayout, tokens: number): number {
  const full = fullColumns(layout, tokens)
  return full - (full % layout.shareColumns)
}

/** Columns that hold a byte of the first `tokens` tokens. */
export function columnsFor(layout: KvLayout, tokens: number): number {
  return pagesFor(layout, tokens) / layout.ranges
}

/**
 * Spans of which each has a group of its own, for the same tokens: one that lies within a group
 * goes to the next, whose region has all of that group. The last stays as it is.
 */
export function mergeSpans(layout: KvLayout, spans: readonly KvSpan[]): KvSpan[] {
  const merged: KvSpan[] = []
  let from = 0
  spans.forEach(({ region, to }, i) => {
    const last = merged.at(-1)
    if (last?.region === region && last.to === from) last.to = to
    else if (
      i === spans.length - 1 ||
      shareableColumns(layout, from) < shareableColumns(layout, to)
    ) {
      merged.push({ region, from, to })
    } else return
    from = to
  })
  return merged
}

/** The columns of spans that can be mapped: all but the last group if it is not full. */
export function sharedColumns(layout: KvLayout, spans: readonly KvSpan[]): KvColumns[] {
  // Where one span ends and the next begins within a group, the next one's region has all of it.
  return spans
    .map(({ region, from, to }) => ({
      region,
      first: shareableColumns(layout, from),
      end: shareableColumns(layout, to),
    }))
    .filter(({ first, end }) => end > first)
}

/** The columns from `first` on that hold a byte of spans, each where all of its bytes lie. */
export function copiedColumns(
  layout: KvLayout,
  spans: readonly KvSpan[],
  first: number,
): KvColumns[] {
  return spans
    .map(({ region, from, to }, i) => ({
      region,
      first: Math.max(first, shareableColumns(layout, from)),
      end: i === spans.length - 1 ? columnsFor(layout, to) : shareableColumns(layout, to),
    }))
    .filter((columns) => columns.end > columns.first)
}

/** Every column that holds a byte of a span: what its holder keeps, so that it can be shared on. */
export function spannedColumns(layout: KvLayout, spans: readonly KvSpan[]): KvColumns[] {
  return spans.map(({ region, from, to }) => ({
    region,
    first: shareableColumns(layout, from),
    end: columnsFor(layout, to),
  }))
}

/** The first `tokens` tokens of spans. */
export function clipSpans(spans: readonly KvSpan[], tokens: number): KvSpan[] {
  return spans
    .filter(({ from }) => from < tokens)
    .map(({ region, from, to }) => ({ region, from, to: Math.min(to, tokens) }))
}

export function spannedTokens(spans: readonly KvSpan[]): number {
  return spans.at(-1)?.to ?? 0
}

interface Region {
  /** A slot writes to it. */
  owned: boolean
  /** Holds by columns, summed; 0 and not owned is free. */
  holds: number
  /** Columns that anybody holds. */
  used: number
  live: Uint16Array
  cache: Uint16Array
}

export class RegionTable {
  readonly layout: KvLayout
  /** Falls and rises with what there is, if others use that memory too; never below `used`. */
  limitPages: number
  readonly mover: KvMover
  /** Regions in which a live hold ended; whoever waits for that clears it. */
  readonly loosened = new Set<number>()
  private readonly regions: (Region | undefined)[]
  private readonly columns: number
  /** By region and column; only `checkHolders` uses it. */
  private readonly recounted: Uint16Array
  private used = 0
  private cached = 0
  private evictable = 0

  constructor(layout: KvLayout, regions: number, limitPages: number, mover: KvMover) {
    this.layout = layout
    this.limitPages = limitPages
    this.mover = mover
    this.columns = layout.rangeBytes / layout.shape.pageBytes
    this.regions = Array.from({ length: regions }, () => undefined)
    this.recounted = new Uint16Array(regions * this.columns)
  }

  get usedPages(): number {
    return this.used * this.layout.ranges
  }

  /** Pages that cached prefixes refer to, whoever else does. */
  get cachedPages(): number {
    return this.cached * this.layout.ranges
  }

  /** Pages that only cached prefixes refer to. */
  get evictablePages(): number {
    return this.evictable * this.layout.ranges
  }

  /** Makes a free region a slot's own, `preferred` if it is free. -1 if none is. */
  take(preferred: number): number {
    const region =
      preferred >= 0 && this.isFree(preferred)
        ? preferred
        : this.regions.findIndex((_, i) => this.isFree(i))
    if (region >= 0) this.region(region).owned = true
    return region
  }

  /** The slot that wrote to it writes no more. */
  leave(region: number): void {
    this.region(region).owned = false
  }

  isFree(region: number): boolean {
    const found = this.regions[region]
    return !found || (!found.owned && found.holds === 0)
  }

  /** How many columns of a region are held, counting each hold. */
  holds(region: number): number {
    return this.regions[region]?.holds ?? 0
  }

  /** A slot may write to it at any time. */
  isWritten(region: number): boolean {
    return this.regions[region]?.owned ?? false
  }

  /** How often a column is held, caches apart. */
  liveHolders(region: number, column: number): number {
    return this.regions[region]?.live[column] ?? 0
  }

  /** Whether others than the one who holds `own` hold a column of its region from `from` on. */
  isHeldFrom({ region, first, end }: KvColumns, from: number): boolean {
    const { live, cache } = this.region(region)
    for (let c = from; c < this.columns; c++) {
      const own = c >= first && c < end ? 1 : 0
      if ((live[c] ?? 0) + (cache[c] ?? 0) > own) return true
    }
    return false
  }

  /** Of these columns, the pages that only cached prefixes refer to. */
  evictableIn(list: readonly KvColumns[]): number {
    let count = 0
    for (const { region, first, end } of list) {
      const { live, cache } = this.region(region)
      for (let c = first; c < end; c++) if (live[c] === 0 && (cache[c] ?? 0) > 0) count++
    }
    return count * this.layout.ranges
  }

  /** Of these columns, the pages that go back if a cached prefix lets go of each once. */
  freedBy(list: readonly KvColumns[]): number {
    let count = 0
    for (const { region, first, end } of list) {
      const { live, cache } = this.region(region)
      for (let c = first; c < end; c++) if (live[c] === 0 && cache[c] === 1) count++
    }
    return count * this.layout.ranges
  }

  hold({ region, first, end }: KvColumns, holder: Holder): void {
    const found = this.region(region)
    const counts = found[holder]
    for (let c = first; c < end; c++) {
      this.tally(found, c, -1)
      const count = (counts[c] ?? 0) + 1
      assert(count < 2 ** 16, 'a column has fewer holders than its counter counts')
      counts[c] = count
      this.tally(found, c, 1)
    }
    found.holds += end - first
    assert(this.usedPages <= this.limitPages, 'used pages keep to the limit')
  }

  /** Ends a hold; columns that nobody else holds are given back. */
  drop({ region, first, end }: KvColumns, holder: Holder): void {
    const found = this.region(region)
    const counts = found[holder]
    if (holder === 'live') this.loosened.add(region)
    let gone = first
    for (let c = first; c < end; c++) {
      assert((counts[c] ?? 0) > 0, `column ${c} of region ${region} is held`)
      this.tally(found, c, -1)
      counts[c] = (counts[c] ?? 0) - 1
      this.tally(found, c, 1)
      if (found.live[c] === 0 && found.cache[c] === 0) continue
      if (c > gone) this.mover.discard(region, gone, c)
      gone = c + 1
    }
    found.holds -= end - first
    // A region without any holder goes back in one call instead of one a range.
    if (found.used === 0) {
      if (end > first) this.mover.discard(region, 0, this.columns)
    } else if (end > gone) this.mover.discard(region, gone, end)
  }

  /** Throws if the counts contradict each other. */
  check(): void {
    let [used, cached, evictable] = [0, 0, 0]
    for (const region of this.regions) {
      if (!region) continue
      let [holds, inUse] = [0, 0]
      for (let c = 0; c < this.columns; c++) {
        const live = region.live[c] ?? 0
        const cache = region.cache[c] ?? 0
        holds += live + cache
        if (live + cache > 0) inUse++
        if (cache > 0) cached++
        if (cache > 0 && live === 0) evictable++
      }
      assert(holds === region.holds, 'a region knows its holds')
      assert(inUse === region.used, 'a region knows its used columns')
      used += inUse
    }
    assert(used === this.used, 'used columns are the sum over regions')
    assert(cached === this.cached, 'cached columns are the sum over regions')
    assert(evictable === this.evictable, 'evictable columns are the sum over regions')
    assert(this.usedPages <= this.limitPages, 'used pages keep to the limit')
  }

  /** Throws unless these, and nobody else, are counted as the holders of this kind. */
  checkHolders(holder: Holder, holds: Iterable<KvColumns>): void {
    this.recounted.fill(0)
    for (const { region, first, end } of holds) {
      for (let c = first; c < end; c++) this.recounted[region * this.columns + c]!++
    }
    this.regions.forEach((region, r) => {
      for (let c = 0; region && c < this.columns; c++) {
        const [counted, held] = [region[holder][c] ?? 0, this.recounted[r * this.columns + c] ?? 0]
        if (counted === held) continue
        assert(false, `column ${c} of region ${r} counts ${counted} ${holder}, not ${held}`)
      }
    })
  }

  private tally(region: Region, column: number, by: number): void {
    const live = present(region.live[column], 'a column')
    const cache = present(region.cache[column], 'a column')
    if (live + cache > 0) {
      this.used += by
      region.used += by
    }
    if (cache > 0) this.cached += by
    if (cache > 0 && live === 0) this.evictable += by
  }

  private region(index: number): Region {
    assert(index >= 0 && index < this.regions.length, `region ${index} exists`)
    return (this.regions[index] ??= {
      owned: false,
      holds: 0,
      used: 0,
      live: new Uint16Array(this.columns),
      cache: new Uint16Array(this.columns),
    })
  }
}

/** Whether any column is in both lists. */
export function overlapAny(some: readonly KvColumns[], others: readonly KvColumns[]): boolean {
  return some.some(({ region, first, end }) =>
    others.some((other) => other.region === region && first < other.end && other.first < end),
  )
}
