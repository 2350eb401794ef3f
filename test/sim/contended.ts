// Owns the memory of a simulated GPU from which another process takes, too: for which columns there
// is some, and for which it was refused.

import { assert } from '../../src/assert.ts'
import type { ContendedMemory } from '../../src/backends/backend.ts'
import type { KvLayout } from '../../src/kv/layout.ts'
import type { KvColumns } from '../../src/kv/regions.ts'

export class ContendedColumns implements ContendedMemory {
  /** Columns that the other process has. */
  taken = 0
  refusals = 0
  private readonly layout: KvLayout
  private readonly total: number
  private most: number
  /** By region, the columns for which there is memory. */
  private readonly there = new Map<number, Set<number>>()
  private count = 0
  private refused: KvColumns[] = []

  constructor(layout: KvLayout, pages: number) {
    this.layout = layout
    this.total = pages / layout.ranges
    this.most = this.total
  }

  /** As much of what is free as the other one wants. */
  take(share: number): void {
    this.taken += Math.ceil(share * Math.max(0, this.total - this.taken - this.count))
  }

  isThere(region: number, column: number): boolean {
    return this.there.get(region)?.has(column) ?? false
  }

  grow(region: number, first: number, end: number): void {
    const there = this.there.get(region) ?? new Set()
    this.there.set(region, there)
    for (let c = first; c < end; c++) {
      if (this.count + this.taken >= this.total) {
        this.refusals++
        this.refused.push({ region, first: c, end: c + 1 })
        continue
      }
      assert(!there.has(c), `column ${c} of region ${region} grows once`)
      there.add(c)
      this.count++
      assert(this.count <= this.most, 'no more is asked for than there is said to be')
    }
  }

  discard(region: number, first: number, end: number): void {
    const there = this.there.get(region)
    for (let c = first; there && c < end; c++) if (there.delete(c)) this.count--
  }

  lacking(): readonly KvColumns[] {
    return this.refused.splice(0)
  }

  obtainablePages(more: number): number {
    const free = Math.max(0, this.total - this.taken - this.count) * this.layout.ranges
    return this.count * this.layout.ranges + Math.min(more, free)
  }

  limit(pages: number): void {
    this.most = pages / this.layout.ranges
  }
}
