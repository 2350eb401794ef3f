// Owns which prefixes are pinned and how much memory that takes. Pinned pages are held as a
// sequence would hold them, so nothing counts on getting them back.

import { assert } from '../assert.ts'
import { LatticeError } from '../errors.ts'
import { MAX_PINNED_PREFIXES, PREFIX_REGIONS } from '../limits.ts'
import { pagesFor } from './layout.ts'
import { type KvColumns, type KvSpan, type RegionTable, spannedColumns } from './regions.ts'

export interface Pin {
  tenant: string
  /** The tenant's own name for it. */
  id: string
  tokens: Int32Array
  /** Where they lie. */
  spans: readonly KvSpan[]
  pinnedMs: number
  /** Prompts that it had served when it was pinned. */
  usesBefore: number
}

/** What may be pinned so that cached prefixes keep to their budget and any sequence still fits. */
export function pinLimitPages({ layout, limitPages }: RegionTable, budgetPages: number): number {
  const others = pagesFor(layout, layout.shape.maxTokens)
  return Math.max(0, Math.min(budgetPages, limitPages - others))
}

export class PinTable {
  readonly limitPages: number
  readonly list: Pin[] = []
  /** Pages that pinned prefixes refer to, each counted once. */
  pages = 0
  private readonly regions: RegionTable

  constructor(regions: RegionTable, limitPages: number) {
    this.regions = regions
    this.limitPages = limitPages
  }

  find(tenant: string, id: string): Pin | undefined {
    return this.list.find((pin) => pin.tenant === tenant && pin.id === id)
  }

  /**
   * @param whole all of its tokens are cached
   * @throws LatticeError `prefix_memory_exhausted`, with nothing changed
   */
  add(pin: Pin, whole: boolean): void {
    const { pages, regions } = this.extent([...this.list, pin])
    const { pageBytes } = this.regions.layout.shape
    if (!whole || pages > this.limitPages) {
      throw full(
        `Pinning ${pin.tokens.length} tokens takes pinned prefixes beyond` +
          ` ${this.limitPages * pageBytes} bytes, what they may have here` +
          ` (${this.pages * pageBytes} are in use).`,
      )
    }
    if (this.list.length >= MAX_PINNED_PREFIXES || regions > PREFIX_REGIONS / 2) {
      throw full(`${this.list.length} prefixes are pinned already; no more can be.`)
    }
    for (const columns of spannedColumns(this.regions.layout, pin.spans)) {
      this.regions.hold(columns, 'live')
    }
    this.list.push(pin)
    this.pages = pages
  }

  /** @throws LatticeError `prefix_memory_exhausted` if so many tokens can never be pinned */
  checkFits(tokens: number): void {
    const { layout } = this.regions
    const pages = pagesFor(layout, tokens)
    if (pages <= this.limitPages) return
    const { pageBytes } = layout.shape
    throw full(
      `Pinning ${tokens} tokens takes ${pages * pageBytes} bytes;` +
        ` pinned prefixes may have ${this.limitPages * pageBytes} here.`,
    )
  }

  remove(pin: Pin): void {
    this.list.splice(this.list.indexOf(pin), 1)
    for (const columns of spannedColumns(this.regions.layout, pin.spans)) {
      this.regions.drop(columns, 'live')
    }
    this.pages = this.extent(this.list).pages
  }

  pagesOf(pin: Pin): number {
    return this.extent([pin]).pages
  }

  *holds(): Generator<KvColumns> {
    for (const { spans } of this.list) yield* spannedColumns(this.regions.layout, spans)
  }

  check(): void {
    assert(this.pages === this.extent(this.list).pages, 'pinned pages are counted once each')
    assert(this.pages <= this.limitPages, 'pinned pages keep to their limit')
  }

  private extent(pins: readonly Pin[]): { pages: number; regions: number } {
    const columns = new Map<number, Set<number>>()
    for (const { spans } of pins) {
      for (const { region, first, end } of spannedColumns(this.regions.layout, spans)) {
        const found = columns.get(region) ?? new Set()
        for (let c = first; c < end; c++) found.add(c)
        columns.set(region, found)
      }
    }
    const count = columns.values().reduce((sum, { size }) => sum + size, 0)
    return { pages: count * this.regions.layout.ranges, regions: columns.size }
  }
}

function full(what: string): LatticeError {
  return new LatticeError('prefix_memory_exhausted', what, {
    todo: 'Unpin a prefix, or start with a larger --prefix-cache and --kv-memory.',
  })
}
