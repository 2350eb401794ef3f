// Catches a prefix that an earlier engine kept and a later one reads wrongly, and places that are
// used again while something that outlives the process still says what they hold.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { Bench, expectedOutcome, sequenceRequest, VOCAB } from '../../test/support/null-engine.ts'
import { Random } from '../../test/support/random.ts'
import { NullBackend } from '../backends/null/backend.ts'
import type { NullColumn } from '../backends/null/kv-memory.ts'
import { NullTier } from '../backends/null/tier.ts'
import type { KvStore, StoredPrefix } from '../kv/tier.ts'
import { LatticeError } from '../errors.ts'

/** 3.2 tokens a page, so that prefixes share pages; two layers. */
const KV = { layers: 2, rowBytes: 80, pageBytes: 256 }
const CONTEXT = 60

/** What outlives an engine. */
class Disk implements KvStore {
  readonly content: (NullColumn | undefined)[]
  readonly records = new Map<number, StoredPrefix>()
  tier: NullTier | undefined
  private nextId = 1

  constructor(capacity: number) {
    this.content = Array.from({ length: capacity }, () => undefined)
  }

  entries(): StoredPrefix[] {
    return [...this.records.values()]
  }

  put(prefix: Omit<StoredPrefix, 'id'>): { id: number; ticket: number } {
    const { parent, from, tenant } = prefix
    const before = this.records.get(parent)
    assert.ok(parent === 0 ? from === 0 : before, 'what a prefix continues is kept before it')
    if (before) assert.equal(before.from + before.tokens.length, from)
    if (before) assert.equal(before.tenant, tenant)
    const id = this.nextId++
    this.records.set(id, { ...prefix, id, places: prefix.places.slice() })
    return { id, ticket: this.tier!.note() }
  }

  remove(id: number): void {
    assert.ok(this.records.delete(id), 'what is removed was kept')
    for (const { id: child, parent } of this.entries()) if (parent === id) this.remove(child)
  }

  /** Places that a record needs as they are. */
  needs(places: Uint32Array): boolean {
    return this.entries().some((record) => record.places.some((place) => places.includes(place)))
  }
}

interface Life {
  disk: Disk
  capacity: number
  kvPages: number
  faults: number
  seed: number
}

function engineOn({ disk, capacity, kvPages, faults, seed }: Life): Bench {
  const sizes = { vocab: VOCAB, contextLength: CONTEXT, maxSequences: 3, stepTokens: 40, kv: KV }
  const backend = new NullBackend(sizes)
  const random = new Random(seed)
  const tier = new NullTier(backend.kv, {
    capacity,
    content: disk.content,
    polls: () => 1 + random.below(6),
    fault: () =>
      random.below(100) < faults ? new LatticeError('os_call_failed', 'io') : undefined,
  })
  const save = tier.save.bind(tier)
  tier.save = (columns, places) => {
    assert.ok(!disk.needs(places), 'a place is written while something kept needs it')
    return save(columns, places)
  }
  tier.store = disk
  disk.tier = tier
  backend.kv.tier = tier
  const watermarks = { high: 0.5, low: 0.3 }
  return new Bench(backend, { maxSequences: 3, kvPages, prefixPages: kvPages, watermarks })
}

const prompts = fc
  .array(fc.constantFrom([1, 2, 3, 4, 5], [1, 2, 9], [6], [7, 8, 7, 8, 7, 8, 7]), {
    minLength: 1,
    maxLength: 6,
  })
  .map((words) => Int32Array.from(words.flat()))

const lives = fc.record({
  capacity: fc.constantFrom(8, 40, 400),
  kvPages: fc.integer({ min: 40, max: 120 }),
  faults: fc.constantFrom(0, 0, 10),
  seed: fc.nat(),
  /** Prompts of each life, and the steps after which it is killed. */
  lives: fc.array(
    fc.record({
      list: fc.array(fc.record({ prompt: prompts, gap: fc.nat(90) }), {
        minLength: 1,
        maxLength: 6,
      }),
      steps: fc.nat(400),
    }),
    { minLength: 2, maxLength: 4 },
  ),
})

test('what an engine left behind when it was killed changes an answer of the next', () => {
  let [kept, hits] = [0, 0]
  fc.assert(
    fc.property(lives, ({ capacity, kvPages, faults, seed, lives: all }) => {
      const disk = new Disk(capacity)
      all.forEach(({ list, steps }, life) => {
        const engine = engineOn({ disk, capacity, kvPages, faults, seed: seed + life })
        engine.core.check()
        if (life > 0) kept += disk.records.size
        let at = 0
        const arrivals = list.map(({ prompt, gap }, id) => {
          at += gap
          return { id, at, request: sequenceRequest({ prompt, maxTokens: 3 }) }
        })
        for (let step = 0; step < steps; step++) {
          for (const { id, at, request } of arrivals) if (at === step) engine.submit(id, request)
          if (!engine.step()) engine.core.settle()
          engine.core.check()
        }
        for (const { id, at, request } of arrivals) {
          if (at >= steps) continue
          const { tokens, reason } = engine.outcome(id)
          const expected = expectedOutcome(request).tokens
          assert.deepEqual(tokens, reason ? expected : expected.slice(0, tokens.length))
          if (life > 0) hits += engine.outcome(id).cachedTokens
        }
      })
    }),
    { seed: 31, numRuns: 120 },
  )
  assert.ok(kept > 50 && hits > 100, `${kept} kept, ${hits} hit`)
})
