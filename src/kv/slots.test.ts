// Catches an account of slots and pages that a simple list would not agree with.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { layerMajor, pagesFor } from './layout.ts'
import { type KvMover, RegionTable } from './regions.ts'
import { SlotTable } from './slots.ts'

const NOBODY: KvMover = { map: () => {}, copy: () => {}, discard: () => {} }

const LAYOUT = layerMajor({ layers: 2, rowBytes: 64, maxTokens: 40, pageBytes: 256 })
const SLOTS = 4

interface ModelSlot {
  state: 'free' | 'held' | 'warm'
  pages: number
  sinceMs: number
  /** Breaks ties of `sinceMs`. */
  retired: number
}

/** What the table should do, said as plainly as possible. */
class Model {
  readonly slots: ModelSlot[] = Array.from({ length: SLOTS }, () => ({
    state: 'free',
    pages: 0,
    sinceMs: 0,
    retired: 0,
  }))
  readonly limit: number
  private retirements = 0

  constructor(limit: number) {
    this.limit = limit
  }

  get used(): number {
    return this.slots.reduce((sum, slot) => sum + slot.pages, 0)
  }

  get available(): number {
    const held = this.slots.filter(({ state }) => state === 'held')
    return this.limit - held.reduce((sum, slot) => sum + slot.pages, 0)
  }

  warm(): ModelSlot[] {
    return this.slots
      .filter(({ state }) => state === 'warm')
      .toSorted((a, b) => a.sinceMs - b.sinceMs || a.retired - b.retired)
  }

  acquire(tokens: number): number {
    const pages = pagesFor(LAYOUT, tokens)
    const slot =
      this.warm().find((warm) => warm.pages <= pages) ??
      this.slots.find(({ state }) => state === 'free')
    if (slot) slot.state = 'held'
    return slot ? this.slots.indexOf(slot) : -1
  }

  grow(slot: number, tokens: number): boolean {
    const held = this.slots[slot]!
    const more = Math.max(0, pagesFor(LAYOUT, tokens) - held.pages)
    if (more > 0 && this.used + more > this.limit) return false
    held.pages += more
    return true
  }

  retire(slot: number, sinceMs: number): void {
    Object.assign(this.slots[slot]!, { state: 'warm', sinceMs, retired: this.retirements++ })
  }

  reclaim(untilMs: number): number {
    const slot = this.warm().find(({ sinceMs }) => sinceMs <= untilMs)
    if (slot) Object.assign(slot, { state: 'free', pages: 0 })
    return slot ? this.slots.indexOf(slot) : -1
  }
}

const tokens = fc.integer({ min: 1, max: 40 })
const operations = fc.array(
  fc.oneof(
    fc.record({ kind: fc.constant('acquire' as const), tokens }),
    fc.record({ kind: fc.constant('grow' as const), pick: fc.nat(), tokens }),
    fc.record({ kind: fc.constant('retire' as const), pick: fc.nat(), abandoned: fc.boolean() }),
    fc.record({ kind: fc.constant('reclaim' as const), ago: fc.constantFrom(0, 3, -Infinity) }),
  ),
  { maxLength: 60 },
)

test('slots and pages go astray in some order of acquire, grow, retire and reclaim', () => {
  fc.assert(
    fc.property(fc.integer({ min: 0, max: 30 }), operations, (limit, list) => {
      const table = new SlotTable(new RegionTable(LAYOUT, SLOTS, limit, NOBODY), SLOTS)
      const model = new Model(limit)
      list.forEach((operation, nowMs) => {
        const held = [...model.slots.keys()].filter((i) => model.slots[i]!.state === 'held')
        if (operation.kind === 'acquire') {
          assert.equal(table.acquire(operation.tokens), model.acquire(operation.tokens))
        } else if (operation.kind === 'reclaim') {
          const untilMs = nowMs - operation.ago
          assert.equal(table.reclaim(untilMs), model.reclaim(untilMs))
        } else if (held.length > 0) {
          const slot = held[operation.pick % held.length]!
          if (operation.kind === 'grow') {
            assert.equal(table.grow(slot, operation.tokens), model.grow(slot, operation.tokens))
          } else {
            const sinceMs = operation.abandoned ? -Infinity : nowMs
            table.retire(slot, sinceMs)
            model.retire(slot, sinceMs)
          }
        }
        table.check()
        model.slots.forEach(({ pages }, i) => assert.equal(table.pagesOf(i), pages))
        assert.equal(table.usedPages, model.used)
        assert.ok(table.usedPages <= limit)
        assert.equal(table.availablePages(), model.available)
        assert.equal(table.warmSinceMs, model.warm()[0]?.sinceMs)
      })
    }),
    { seed: 5, numRuns: 1000 },
  )
})

test('a slot grows or retires in the hands of nobody', () => {
  const table = new SlotTable(new RegionTable(LAYOUT, SLOTS, 10, NOBODY), SLOTS)
  assert.throws(() => table.grow(0, 1), /only a held slot grows/)
  const slot = table.acquire(1)
  table.retire(slot, 0)
  assert.throws(() => table.grow(slot, 1), /only a held slot grows/)
  assert.throws(() => table.retire(slot, 0), /only a held slot retires/)
})
