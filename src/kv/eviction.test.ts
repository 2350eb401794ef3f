// Catches an eviction that frees nothing while something could be freed, forgets what is worth
// more before what is worth less, touches what is pinned, or looks at the whole tree.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { EvictionName } from './eviction.ts'
import { layerMajor } from './layout.ts'
import { PrefixCache } from './prefix.ts'
import { type KvColumns, type KvSpan, RegionTable, spannedTokens } from './regions.ts'

/** 4 tokens a page, one layer: a page a column. */
const SHAPE = { layers: 1, rowBytes: 64, maxTokens: 4096, pageBytes: 256 }
const MOVER = { map() {}, copy() {}, discard() {} }

class Fixture {
  readonly regions: RegionTable
  readonly cache: PrefixCache
  private next = 0

  constructor(eviction: EvictionName, regions = 100, budgetPages = 1e6, limitPages = 1e6) {
    this.regions = new RegionTable(layerMajor(SHAPE), regions, limitPages, MOVER)
    this.cache = new PrefixCache(this.regions, budgetPages, { eviction })
  }

  /** Caches a prompt, the part of it that is not cached yet in a region of its own. */
  cached(tokens: Int32Array): KvSpan[] {
    const found = this.cache.lookup('t', tokens, tokens.length)
    const own = { region: this.next++, from: spannedTokens(found), to: tokens.length }
    this.cache.insert('t', tokens, own.from < own.to ? [...found, own] : found)
    return this.cache.lookup('t', tokens, tokens.length)
  }

  /** Tokens of a prompt that are cached; looking counts as a use, so only once a test. */
  left(tokens: Int32Array): number {
    return spannedTokens(this.cache.lookup('t', tokens, tokens.length))
  }

  hold(spans: readonly KvSpan[]): void {
    for (const columns of this.columns(spans)) this.regions.hold(columns, 'live')
  }

  drop(spans: readonly KvSpan[]): void {
    for (const columns of this.columns(spans)) this.regions.drop(columns, 'live')
  }

  private columns(spans: readonly KvSpan[]): KvColumns[] {
    return spans.map(({ region, from, to }) => ({
      region,
      first: Math.floor(from / 4),
      end: Math.ceil(to / 4),
    }))
  }
}

/** `length` tokens that begin with these and go on with the last of them. */
function prompt(length: number, ...start: number[]): Int32Array {
  return Int32Array.from({ length }, (_, i) => start[i] ?? start.at(-1)!)
}

test('a prefix whose pages sequences use is forgotten, though that frees nothing', () => {
  const f = new Fixture('lru')
  const [used, other] = [prompt(40, 1), prompt(40, 2)]
  const spans = f.cached(used)
  f.cached(other)
  f.hold(spans)
  assert.ok(f.cache.evict())
  assert.equal(f.cache.evict(), false, 'there is nothing to free')
  assert.equal(f.left(used), 40)
  assert.equal(f.left(other), 0)
  f.drop(spans)
  assert.ok(f.cache.evict(), 'what a sequence has left is never freed')
  assert.equal(f.regions.usedPages, 0)
})

test('the end of a chain that a sequence computed again keeps what lies before it', () => {
  const f = new Fixture('cost')
  const tokens = prompt(40, 1)
  f.cached(tokens.slice(0, 20))
  // The last 20 tokens lie with a sequence that computed all 40 for itself.
  f.cached(tokens)
  f.hold([{ region: 1, from: 20, to: 40 }])
  f.hold([{ region: 9, from: 0, to: 20 }])
  const { usedPages } = f.regions
  assert.ok(f.cache.evict())
  assert.equal(f.regions.usedPages, usedPages - 5)
  assert.equal(f.left(tokens), 0)
})

test('an end within a page of what leads to it keeps that page from going', () => {
  const f = new Fixture('lru')
  const tokens = prompt(40, 1)
  f.cached(tokens)
  f.cached(Int32Array.of(...tokens.subarray(0, 38), 7))
  // Three nodes: 38 tokens, two more in the same page, another one in a page of its own.
  const later = prompt(400, 2)
  f.cached(later)
  f.cache.evict()
  f.cache.evict()
  f.cache.check()
  assert.equal(f.left(later), 400, 'what was used later went first')
})

test('the policies choose as they are named', () => {
  const survivors: Partial<Record<EvictionName, string>> = {}
  for (const eviction of ['lru', 'lfu', 'cost'] as const) {
    const f = new Fixture(eviction)
    const prompts = {
      /** Used often, long ago; 4 tokens in a page of their own are cheap to compute again. */
      often: prompt(4, 1),
      /** Long, at positions where attention costs: the dearest to compute again, a page. */
      dear: prompt(4000, 2),
      recent: prompt(8, 3),
    }
    for (let i = 0; i < 5; i++) f.cached(prompts.often)
    f.cached(prompts.dear)
    f.cached(prompts.recent)
    f.cache.evict()
    f.cache.evict()
    survivors[eviction] = Object.entries(prompts)
      .filter(([, tokens]) => f.left(tokens) > 0)
      .map(([name]) => name)
      .join()
  }
  assert.deepEqual(survivors, { lru: 'recent', lfu: 'often', cost: 'often' })
  const f = new Fixture('cost')
  f.cached(prompt(4000, 2))
  f.cached(prompt(8, 3))
  f.cache.evict()
  assert.equal(f.left(prompt(4000, 2)), 4000, 'recomputing far positions costs no more')
})

test('what frees little is weighed by all that it holds', () => {
  const f = new Fixture('cost')
  const [held, other] = [prompt(40, 1), prompt(8, 2)]
  f.cached(held)
  f.cached(other)
  f.cached(other)
  // 40 tokens for ten pages are less than twice eight for two, but nine of the ten are in use.
  f.hold([{ region: 0, from: 0, to: 36 }])
  assert.ok(f.cache.evict())
  assert.equal(f.left(held), 40)
  assert.equal(f.left(other), 0)
})

test('what was used often long ago is never forgotten', () => {
  for (const eviction of ['lfu', 'cost'] as const) {
    const f = new Fixture(eviction, 1000, 100)
    const old = prompt(40, 1)
    for (let i = 0; i < 20; i++) f.cached(old)
    for (let i = 0; i < 400; i++) f.cached(prompt(40, 2 + (i >> 1)))
    assert.equal(f.left(old), 0, eviction)
  }
})

test('a prompt longer than the budget drives out every other', () => {
  const f = new Fixture('lru', 100, 100)
  f.cached(prompt(200, 1))
  f.cached(prompt(4000, 2))
  f.cache.check()
  assert.equal(f.left(prompt(4000, 2)), 400)
})

test('a pinned prefix is forgotten, or leaves no room for a whole context', () => {
  const f = new Fixture('lru', 100, 1000, 1024 + 60)
  const [pinned, long] = [prompt(100, 1), prompt(200, 2)]
  f.cached(Int32Array.of(...pinned, 5, 6, 7, 8))
  f.cache.pin('t', 'one', pinned)
  f.cache.pin('t', 'one', pinned)
  f.cached(long)
  // 25 and 50 pages are more than the 60 that a context of 1,024 pages leaves.
  assert.throws(() => f.cache.pin('t', 'two', long), { code: 'prefix_memory_exhausted' })
  assert.throws(() => f.cache.pin('u', 'one', prompt(4, 9)), { code: 'prefix_memory_exhausted' })
  while (f.cache.evict()) f.cache.check()
  assert.equal(f.left(Int32Array.of(...pinned, 5)), 100)
  assert.equal(f.regions.usedPages, 25)
  assert.equal(f.cache.unpin('u', 'one'), false, 'another tenant unpins it')
  assert.ok(f.cache.unpin('t', 'one'))
  while (f.cache.evict()) f.cache.check()
  assert.equal(f.regions.usedPages, 0)
})

test('an eviction looks at the whole tree', () => {
  let looks = 0
  class CountingRegions extends RegionTable {
    override evictableIn(list: readonly KvColumns[]): number {
      looks++
      return super.evictableIn(list)
    }
    override freedBy(list: readonly KvColumns[]): number {
      looks++
      return super.freedBy(list)
    }
  }
  const LEAVES = 10_000
  for (const eviction of ['lru', 'lfu', 'cost'] as const) {
    const shape = { ...SHAPE, maxTokens: 64 }
    const regions = new CountingRegions(layerMajor(shape), LEAVES + 1, 1e6, MOVER)
    const cache = new PrefixCache(regions, 1e6, { eviction })
    const held: KvColumns[] = []
    for (let i = 0; i < LEAVES; i++) {
      const tokens = prompt(12, i % 100, i % 10, i)
      cache.insert('t', tokens, [{ region: i, from: 0, to: 12 }])
      const columns = { region: i, first: 0, end: 3 }
      // Half of it is used while the first evictions look for what is not.
      if (i % 2 === 0) held.push(columns)
      if (i % 2 === 0) regions.hold(columns, 'live')
    }
    looks = 0
    let evicted = 0
    for (; evicted < LEAVES / 4; evicted++) assert.ok(cache.evict())
    for (const columns of held) regions.drop(columns, 'live')
    while (cache.evict()) evicted++
    assert.equal(regions.usedPages, 0)
    assert.ok(evicted >= LEAVES, `${evicted} evictions`)
    // Each leaf is looked at when it goes, once more when its worth turns out higher, and once
    // while it is used: a constant, where a walk would take thousands.
    assert.ok(looks < 6 * evicted, `${eviction}: ${looks} looks for ${evicted} evictions`)
  }
})
