// Catches a prefix cache that a list of remembered prompts would not agree with, and pages that go
// while somebody refers to them, or stay when nobody does.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import type { LatticeError } from '../errors.ts'
import { EVICTION_NAMES, type EvictionName } from './eviction.ts'
import { type KvLayout, layerMajor } from './layout.ts'
import { PrefixCache } from './prefix.ts'
import { KvHistory } from './history.ts'
import { kvMap } from './map.ts'
import { type KvMover, type KvSpan, RegionTable, spannedTokens } from './regions.ts'
import { SlotTable } from './slots.ts'

/** 3.2 tokens a page: rows lie across pages. */
const LAYOUT = layerMajor({ layers: 2, rowBytes: 80, maxTokens: 40, pageBytes: 256 })
const REGIONS = 9
const SLOTS = 4

/**
 * Memory in which each byte's place holds which token, of which sequence, was written there last;
 * a sequence is named by all of its tokens up to there.
 */
class Memory implements KvMover {
  readonly bytes: string[][] = Array.from({ length: REGIONS }, () => [])
  private readonly slots = new Map<number, { region: number; shared: readonly KvSpan[] }>()
  private readonly layout: KvLayout

  constructor(layout: KvLayout) {
    this.layout = layout
  }

  map(slot: number, region: number, shared: readonly KvSpan[]): void {
    this.slots.set(slot, { region, shared })
  }

  copy(slot: number, first: number, shared: readonly KvSpan[]): void {
    const { tokenStride, shape } = this.layout
    const end = spannedTokens(shared) * tokenStride
    const { region } = this.slots.get(slot)!
    const from = this.bytes[shared.at(-1)!.region]!
    for (let i = first * shape.pageBytes; i < end; i++) this.bytes[region]![i] = from[i]!
  }

  discard(region: number, first: number, end: number): void {
    const { pageBytes } = this.layout.shape
    for (let i = first * pageBytes; i < end * pageBytes; i++) delete this.bytes[region]![i]
  }

  write(slot: number, tokens: Int32Array, from: number): void {
    const { tokenStride } = this.layout
    for (let t = from; t < tokens.length; t++) {
      const name = tokens.subarray(0, t + 1).join()
      for (let i = t * tokenStride; i < (t + 1) * tokenStride; i++) this.put(slot, i, name)
    }
  }

  /** What a slot's reader finds where token t lies. */
  read(slot: number, t: number): Set<string | undefined> {
    const { tokenStride } = this.layout
    const found = new Set<string | undefined>()
    for (let i = t * tokenStride; i < (t + 1) * tokenStride; i++) found.add(this.at(slot, i))
    return found
  }

  pages(): number {
    const { pageBytes } = this.layout.shape
    const used = this.bytes.map(
      (row) => new Set(Object.keys(row).map((i) => Math.floor(+i / pageBytes))),
    )
    return used.reduce((sum, { size }) => sum + size, 0) * this.layout.ranges
  }

  private at(slot: number, i: number): string | undefined {
    return this.bytes[this.regionAt(slot, i)]![i]
  }

  private put(slot: number, i: number, name: string): void {
    const region = this.regionAt(slot, i)
    assert.equal(region, this.slots.get(slot)?.region ?? slot, 'a write reaches shared memory')
    this.bytes[region]![i] = name
  }

  regionAt(slot: number, i: number): number {
    const { tokenStride, shape } = this.layout
    const { region, shared } = this.slots.get(slot) ?? { region: slot, shared: [] }
    const page = Math.floor(i / shape.pageBytes) * shape.pageBytes
    // The last span that begins before this page ends there, if it fills the page.
    const whole = Math.floor((spannedTokens(shared) * tokenStride) / shape.pageBytes)
    if (page >= whole * shape.pageBytes) return region
    const start = (span: KvSpan) =>
      Math.floor((span.from * tokenStride) / shape.pageBytes) * shape.pageBytes
    return shared.findLast((span) => start(span) <= page)!.region
  }
}

const words = fc.array(fc.constantFrom([1], [2, 3, 4], [5, 5, 5, 5, 5], [6, 7]), {
  minLength: 1,
  maxLength: 7,
})
const operations = fc.array(
  fc.oneof(
    {
      weight: 4,
      arbitrary: fc.record({
        kind: fc.constant('begin' as const),
        tenant: fc.constantFrom('a', 'b'),
        words,
        keep: fc.boolean(),
      }),
    },
    {
      weight: 2,
      arbitrary: fc.record({
        kind: fc.constant('fork' as const),
        pick: fc.nat(),
        tokens: fc.nat(40),
        words,
      }),
    },
    { weight: 4, arbitrary: fc.record({ kind: fc.constant('end' as const), pick: fc.nat() }) },
    { weight: 1, arbitrary: fc.record({ kind: fc.constant('evict' as const) }) },
    { weight: 1, arbitrary: fc.record({ kind: fc.constant('pin' as const), pick: fc.nat() }) },
    { weight: 1, arbitrary: fc.record({ kind: fc.constant('unpin' as const), pick: fc.nat() }) },
  ),
  { minLength: 4, maxLength: 50 },
)

interface Live {
  slot: number
  tokens: Int32Array
}

class Run {
  readonly memory = new Memory(LAYOUT)
  readonly regions = new RegionTable(LAYOUT, REGIONS, 10_000, this.memory)
  readonly table = new SlotTable(this.regions, SLOTS)
  readonly cache: PrefixCache
  readonly live: Live[] = []
  /** Every prompt that was cached, by tenant; evicted ones too. */
  readonly remembered: { tenant: string; tokens: Int32Array }[] = []
  hits = 0

  constructor(budget: number, eviction: EvictionName) {
    this.cache = new PrefixCache(this.regions, budget, { eviction })
  }

  begin(tenant: string, tokens: Int32Array, keep: boolean, roomy: boolean): void {
    const spans = this.cache.lookup(tenant, tokens, tokens.length - 1)
    const common = Math.max(
      0,
      ...this.remembered
        .filter((entry) => entry.tenant === tenant)
        .map((entry) => tokens.findIndex((t, i) => t !== entry.tokens[i]))
        .map((at) => (at < 0 ? tokens.length - 1 : Math.min(at, tokens.length - 1))),
    )
    const hit = spannedTokens(spans)
    assert.ok(hit <= common, 'a prefix is found that nobody cached')
    if (roomy && this.cache.evictions === 0)
      assert.equal(hit, common, 'a cached prefix is not found')
    this.hits += hit
    const slot = this.place(spans, tokens.length)
    if (slot < 0) return
    this.grow(slot, tokens, hit)
    if (!keep) return
    this.cache.insert(tenant, tokens, this.table.spansOf(slot, tokens.length))
    this.remembered.push({ tenant, tokens })
  }

  fork({ slot, tokens }: Live, count: number, more: readonly number[]): void {
    const spans = this.table.spansOf(slot, count)
    const child = this.place(spans, count)
    if (child >= 0) this.grow(child, Int32Array.of(...tokens.subarray(0, count), ...more), count)
  }

  evict(): boolean {
    const { usedPages } = this.table
    const evicted = this.cache.evict()
    assert.equal(
      this.table.usedPages < usedPages,
      evicted,
      'evicting frees, or says that it cannot',
    )
    return evicted
  }

  /** Pins a prompt or its first half, as far as it is still cached. */
  pin(pick: number): void {
    const entry = this.remembered[pick % Math.max(1, this.remembered.length)]
    if (!entry) return
    const tokens = entry.tokens.slice(0, pick % 2 ? undefined : entry.tokens.length >> 1)
    if (tokens.length === 0) return
    try {
      this.cache.pin(entry.tenant, tokens.join(), tokens)
    } catch (thrown) {
      assert.equal((thrown as LatticeError).code, 'prefix_memory_exhausted')
    }
  }

  unpin(pick: number): void {
    const { list } = this.cache.pins
    const pin = list[pick % Math.max(1, list.length)]
    if (pin) assert.ok(this.cache.unpin(pin.tenant, pin.id))
  }

  check(): void {
    this.table.check()
    this.cache.check()
    for (const { tenant, tokens } of this.cache.pins.list) {
      const found = spannedTokens(this.cache.lookup(tenant, tokens, tokens.length))
      assert.equal(found, tokens.length, 'a pinned prefix is gone')
    }
    for (const { slot, tokens } of this.live) {
      tokens.forEach((_, t) => {
        const expected = new Set([tokens.subarray(0, t + 1).join()])
        assert.deepEqual(this.memory.read(slot, t), expected, `token ${t} of slot ${slot}`)
      })
    }
    assert.equal(this.memory.pages(), this.table.usedPages, 'pages that nobody counts')
    this.checkMap()
  }

  /** What is shown is what is counted: pages, references and the bytes that are tokens. */
  private checkMap(): void {
    const sequences = this.live.map(({ slot, tokens }, id) => ({
      id,
      slot,
      computed: tokens.length,
    }))
    const map = kvMap(this.table, this.cache, new KvHistory(() => 0), sequences, 0)
    const states = Object.values(map.pages).reduce((a, b) => a + b, 0)
    assert.equal(states, map.usedPages, 'the map has every used page once')
    for (let region = 0; region < REGIONS; region++) {
      const runs = map.runs.filter((run) => run.region === region)
      const holds = runs.reduce((sum, run) => sum + run.references * (run.end - run.first), 0)
      assert.equal(holds, this.regions.holds(region), 'references on the map')
    }
    const { tokenStride, ranges, shape } = LAYOUT
    const bytes = new Uint8Array(REGIONS * LAYOUT.rangeBytes)
    // A column that is held is full up to the last token: what lies before was copied there.
    const add = (region: number, from: number, to: number): void => {
      const start = from * tokenStride
      const at = region * LAYOUT.rangeBytes
      bytes.fill(1, at + start - (start % shape.pageBytes), at + to * tokenStride)
    }
    for (const { slot, tokens } of this.live) {
      const end = tokens.length * tokenStride
      for (let i = 0; i < end; i += shape.pageBytes) {
        const at = this.memory.regionAt(slot, i) * LAYOUT.rangeBytes
        bytes.fill(1, at + i, at + Math.min(end, i + shape.pageBytes))
      }
      for (const { region, from, to } of this.table.spansOf(slot, tokens.length)) {
        add(region, from, to)
      }
    }
    for (const { region, from, tokens } of this.cache.nodes()) {
      add(region, from, from + tokens.length)
    }
    let count = 0
    for (const byte of bytes) count += byte
    assert.equal(map.tokenBytes, count * ranges, 'bytes that are tokens')
  }

  private place(spans: readonly KvSpan[], tokens: number): number {
    this.table.pin(spans)
    for (;;) {
      const slot = spans.length > 0 ? this.table.acquireShared(spans) : this.table.acquire(tokens)
      if (slot >= 0) return slot
      if (this.table.reclaim(Infinity) >= 0 || this.evict()) continue
      this.table.unpin(spans)
      return -1
    }
  }

  private grow(slot: number, tokens: Int32Array, from: number): void {
    const kept = tokens.subarray(0, LAYOUT.shape.maxTokens)
    assert.ok(this.table.grow(slot, kept.length))
    this.memory.write(slot, kept, from)
    this.live.push({ slot, tokens: kept })
  }
}

test('cached prefixes, forks and their ends lose a page, keep one, or mix tokens up', () => {
  let [hits, evictions, pins] = [0, 0, 0]
  fc.assert(
    fc.property(
      fc.constantFrom(8, 30, 1000),
      fc.constantFrom(...EVICTION_NAMES),
      operations,
      (budget, eviction, list) => {
        const run = new Run(budget, eviction)
        for (const operation of list) {
          const pick = 'pick' in operation ? operation.pick % Math.max(1, run.live.length) : 0
          const picked = run.live[pick]
          if (operation.kind === 'begin') {
            const tokens = Int32Array.from(operation.words.flat())
            run.begin(operation.tenant, tokens, operation.keep, budget === 1000)
          } else if (operation.kind === 'evict') run.evict()
          else if (operation.kind === 'pin') run.pin(operation.pick)
          else if (operation.kind === 'unpin') run.unpin(operation.pick)
          else if (picked && operation.kind === 'fork') {
            const count = 1 + (operation.tokens % picked.tokens.length)
            run.fork(picked, count, operation.words.flat().slice(0, 40 - count))
          } else if (picked) {
            run.live.splice(pick, 1)
            run.table.retire(picked.slot, 0)
          }
          run.check()
        }
        hits += run.hits
        evictions += run.cache.evictions
        for (const { slot } of run.live.splice(0)) run.table.retire(slot, 0)
        while (run.table.reclaim(Infinity) >= 0);
        while (run.evict());
        run.check()
        pins += run.cache.pins.list.length
        assert.equal(run.table.usedPages, run.cache.pins.pages, 'pages are left behind')
        for (const { tenant, id } of [...run.cache.pins.list]) run.cache.unpin(tenant, id)
        while (run.evict());
        run.check()
        assert.equal(run.table.usedPages, 0, 'pages are left behind')
        assert.equal(run.memory.pages(), 0)
      },
    ),
    { seed: 29, numRuns: 1200 },
  )
  assert.ok(hits > 800 && evictions > 400 && pins > 100, `${hits} ${evictions} ${pins}`)
})
