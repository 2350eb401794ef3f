// Catches a sequence that is moved out of memory and comes back as another, late, or never; a place
// or a page that is left behind; a failed transfer that changes an answer.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import {
  Bench,
  type BenchEvent,
  expectedOutcome,
  sequenceRequest,
  VOCAB,
} from '../../test/support/null-engine.ts'
import { Random } from '../../test/support/random.ts'
import { NullBackend } from '../backends/null/backend.ts'
import { NullTier, type NullTierOptions } from '../backends/null/tier.ts'
import { LatticeError } from '../errors.ts'
import { GREEDY, type SequenceRequest } from './api.ts'
import type { CoreOptions } from './core-contract.ts'

/** 3.2 tokens a page, so that rows lie across pages; two layers. */
const KV = { layers: 2, rowBytes: 80, pageBytes: 256 }
const CONTEXT = 80

function bench(options: CoreOptions & { stepTokens: number }, tier: NullTierOptions): Bench {
  const { stepTokens, maxSequences } = options
  const sizes = { vocab: VOCAB, contextLength: CONTEXT, maxSequences, stepTokens, kv: KV }
  const backend = new NullBackend(sizes)
  backend.kv.tier = new NullTier(backend.kv, tier)
  return new Bench(backend, options)
}

/** Tickets end in any order, and some of them fail. */
function disorder(
  seed: number,
  pollsMax: number,
  faults: number,
): Omit<NullTierOptions, 'capacity'> {
  const random = new Random(seed)
  return {
    polls: () => 1 + random.below(pollsMax),
    fault: () =>
      random.below(100) < faults ? new LatticeError('os_call_failed', 'io') : undefined,
  }
}

/** Prompts of a few words, so that they begin alike. */
const prompts = fc
  .array(fc.constantFrom([1, 2, 3, 4, 5], [1, 2, 9], [6], [7, 8, 7, 8, 7, 8, 7]), {
    minLength: 1,
    maxLength: 6,
  })
  .map((words) => Int32Array.from(words.flat()))

const loads = fc.record({
  core: fc.record({
    maxSequences: fc.integer({ min: 2, max: 6 }),
    // One sequence of 80 tokens needs 50 pages.
    kvPages: fc.integer({ min: 50, max: 110 }),
    prefixPages: fc.constantFrom(0, 0, 12, 50),
    greedy: fc.boolean(),
    watermarks: fc.constantFrom(
      { high: 0.9, low: 0.8 },
      { high: 0.2, low: 0.1 },
      { high: 0, low: 0 },
    ),
    prefixOutput: fc.boolean(),
  }),
  extraBudget: fc.nat(30),
  capacity: fc.constantFrom(5, 30, 200),
  pollsMax: fc.constantFrom(1, 4, 20),
  faults: fc.constantFrom(0, 0, 20),
  seed: fc.nat(),
  arrivals: fc.array(
    fc.record({
      prompt: prompts,
      choices: fc.constantFrom(1, 1, 2, 4),
      maxTokens: fc.oneof(fc.integer({ min: 1, max: 3 }), fc.integer({ min: 10, max: 36 })),
      temperature: fc.constantFrom(0, 1),
      seed: fc.nat(1000),
      gap: fc.oneof(fc.nat(4), fc.nat(40)),
      // A fifth of the choices is aborted.
      abortAfter: fc.nat(60).chain((at) => fc.constantFrom(at, ...Array(4).fill(undefined))),
    }),
    { minLength: 3, maxLength: 9 },
  ),
})

test('a sequence that makes room is answered otherwise, or leaves something behind', (t) => {
  const seen = { demotions: 0, fetched: 0, offloads: 0, recomputes: 0, lost: 0 }
  fc.assert(
    fc.property(loads, ({ core, extraBudget, capacity, pollsMax, faults, seed, arrivals }) => {
      const stepTokens = core.maxSequences + extraBudget
      const tier = { capacity, ...disorder(seed, pollsMax, faults) }
      const engine = bench({ ...core, stepTokens }, tier)
      const requests: SequenceRequest[] = []
      const events: BenchEvent[] = []
      let at = 0
      arrivals.forEach(({ choices, gap, abortAfter, temperature, seed, ...arrival }) => {
        at += gap
        const samplings = Array.from({ length: choices }, (_, choice) => {
          return { ...GREEDY, temperature, seed: seed + choice }
        })
        const ids = samplings.map((sampling) => {
          return requests.push(sequenceRequest({ ...arrival, sampling })) - 1
        })
        const request = requests[ids[0]!]!
        events.push({ at, act: () => engine.submitChoices(ids, request, samplings) })
        for (const [choice, id] of ids.entries()) {
          if (abortAfter === undefined || choice === 1) continue
          events.push({ at: at + abortAfter, act: () => engine.core.abort(id) })
        }
      })
      engine.play(events, ({ usedPages, pageBytes, residentBytes }) => {
        assert.ok(usedPages <= core.kvPages, 'the limit is exceeded')
        assert.ok(residentBytes <= usedPages * pageBytes, 'memory is used that nobody counted')
      })
      engine.settle()
      const { kv, preemptions, tier: after } = engine.core.snapshot()
      seen.offloads += after!.offloads
      seen.recomputes += preemptions - after!.offloads
      seen.lost += after!.lost
      if (core.prefixPages === 0) assert.equal(after!.usedBytes, 0, 'places are left behind')
      seen.demotions += after!.demotions
      assert.ok(kv.usedPages <= core.prefixPages, 'pages are left behind')
      assert.equal(kv.residentBytes, kv.usedPages * kv.pageBytes)
      seen.fetched += after!.fetches
      requests.forEach((request, id) => {
        const { tokens, reason, outputTokens, started } = engine.outcome(id)
        const expected = expectedOutcome(request)
        if (reason === 'abort') {
          assert.deepEqual(tokens, expected.tokens.slice(0, tokens.length))
        } else
          assert.deepEqual({ tokens, reason, outputTokens, started }, { ...expected, started: 1 })
      })
    }),
    { seed: 29, numRuns: 1000 },
  )
  const { demotions, fetched, offloads, recomputes, lost } = seen
  t.diagnostic(JSON.stringify(seen))
  assert.ok(demotions > 500 && fetched > 50 && offloads > 300 && recomputes > 100 && lost > 20)
})

test('the map forgets what is on disk, on its way, or lately happened', () => {
  const core = { maxSequences: 2, kvPages: 50, greedy: true, comeBack: 'moved' } as const
  const sizes = { polls: () => 3, capacity: 100 }
  const engine = bench({ ...core, stepTokens: 64 }, sizes)
  const map = () => engine.core.answer({ kind: 'map' }).map
  for (const id of [0, 1]) {
    const prompt = new Int32Array(35).fill(id)
    engine.submit(id, sequenceRequest({ prompt, maxTokens: 30 }))
  }
  const seen = new Set<string>()
  for (let step = 0; !engine.core.idle; step++) {
    assert.ok(step < 1000, 'it does not end')
    engine.step()
    const { sequences, tier } = engine.core.snapshot()
    const { disk, pages, runs } = map()
    const preempted = sequences.find(({ state }) => /load/.test(state))
    if (!preempted) {
      assert.deepEqual([disk!.usedPages, pages.moving], [0, 0])
      continue
    }
    seen.add(preempted.state)
    const { id, state } = preempted
    // 35 tokens and more fill 11 columns and more of two pages.
    assert.ok(disk!.usedPages >= 22 && disk!.usedPages * 256 === tier!.usedBytes)
    assert.deepEqual(new Set(disk!.runs.flatMap(({ sequences }) => sequences)), new Set([id]))
    const out = state === 'offloaded'
    assert.deepEqual(disk!.pages, {
      cold: 0,
      copy: 0,
      offloaded: out ? disk!.usedPages : 0,
      moving: out ? 0 : disk!.usedPages,
    })
    const moving = runs.filter((run) => run.state === 'moving')
    assert.deepEqual(
      new Set(moving.flatMap(({ sequences }) => sequences)),
      new Set(out ? [] : [id]),
    )
    if (state === 'offloading') assert.equal(pages.warm, 0, 'what leaves is shown as warm')
  }
  assert.deepEqual([...seen].toSorted(), ['loading', 'offloaded', 'offloading'])
  const { totals } = map()
  const { savedBytes, loadedBytes } = engine.core.snapshot().tier!
  assert.deepEqual([totals['offload']!.bytes, totals['reload']!.bytes], [savedBytes, loadedBytes])
  assert.ok(savedBytes > 0 && totals['preempt']!.count > 0)
})

test('a cached prompt that is on disk is shown as in memory, or not at all', () => {
  const sizes = { polls: () => 2, capacity: 100 }
  const engine = bench({ maxSequences: 1, kvPages: 100, prefixPages: 50, stepTokens: 64 }, sizes)
  const prompt = Int32Array.from({ length: 32 }, (_, i) => i % VOCAB)
  const settle = () => engine.core.settle()
  const map = () => engine.core.answer({ kind: 'map' }).map
  const tell = (kind: 'offload' | 'reload') => {
    const [session] = engine.core.answer({ kind: 'sessions', tenant: 'default' })
    return engine.core.answer({ kind, tenant: 'default', id: session!.id })
  }
  engine.submit(0, sequenceRequest({ prompt, maxTokens: 1 }))
  engine.runAll()
  engine.settle()
  // 32 tokens of 80 bytes fill 10 columns of two pages.
  const states = () => {
    const { pages, disk, prefixes } = map()
    return [pages.cached, pages.moving, disk!.pages, prefixes[0]!.tier]
  }
  const none = { cold: 0, offloaded: 0, copy: 0, moving: 0 }
  assert.deepEqual(states(), [20, 0, none, 'memory'])
  assert.equal(tell('offload'), 'moving')
  assert.deepEqual(states(), [0, 20, { ...none, moving: 20 }, 'memory'])
  for (let i = 0; i < 5; i++) settle()
  assert.deepEqual(states(), [0, 0, { ...none, cold: 20 }, 'disk'])
  assert.equal(map().runs.length, 0)
  assert.equal(tell('reload'), 'moving')
  assert.deepEqual(states(), [0, 20, { ...none, moving: 20 }, 'both'])
  for (let i = 0; i < 5; i++) settle()
  assert.deepEqual(states(), [20, 0, { ...none, copy: 20 }, 'both'])
  const bytes = 20 * 256
  assert.deepEqual(map().totals, {
    offload: { count: 1, bytes },
    demote: { count: 1, bytes },
    reload: { count: 1, bytes },
  })
})

test('a disk that takes nothing keeps those who wait for memory waiting', () => {
  const fault = () => new LatticeError('os_call_failed', 'io')
  const core = { maxSequences: 1, kvPages: 50, prefixPages: 50, watermarks: { high: 0.3, low: 0 } }
  const engine = bench({ ...core, stepTokens: 32 }, { capacity: 100, fault })
  engine.submit(0, sequenceRequest({ prompt: new Int32Array(30).fill(1), maxTokens: 1 }))
  engine.submit(1, sequenceRequest({ prompt: new Int32Array(5).fill(2), maxTokens: 75 }))
  for (let step = 0; step < 200 && !engine.core.idle; step++) engine.step()
  assert.equal(engine.outcome(1).reason, 'length')
})

test('what the prefix cache has no room for is forgotten while there is room on disk', () => {
  // A prompt takes 20 pages: from 90 to 80 % of what prefixes may keep is one. Memory is plenty.
  const core = { maxSequences: 1, kvPages: 1000, prefixPages: 120 }
  const engine = bench({ ...core, stepTokens: 64 }, { capacity: 200 })
  for (let id = 0; id < 10; id++) {
    const prompt = new Int32Array(30).fill(id)
    engine.submit(id, sequenceRequest({ prompt, maxTokens: 1 }))
    while (!engine.core.idle) engine.step()
    engine.settle()
    engine.core.check()
  }
  const sessions = engine.core.answer({ kind: 'sessions', tenant: 'default' })
  assert.equal(sessions.length, 10)
  const places = sessions.map(({ where }) => where)
  assert.deepEqual(places.toSorted(), [...Array(6).fill('disk'), ...Array(4).fill('memory')])
})

test('a prompt too large for what is free drives out what the disk has room for', () => {
  // Ten small prompts are two thirds of the budget; one of 80 % of it comes at once.
  const core = { maxSequences: 1, kvPages: 1000, prefixPages: 60 }
  for (const pollsMax of [1, 5]) {
    const engine = bench(
      { ...core, stepTokens: 64 },
      { capacity: 200, ...disorder(1, pollsMax, 0) },
    )
    const prompts = Array.from({ length: 10 }, (_, id) => new Int32Array(6).fill(id))
    for (const prompt of [...prompts, new Int32Array(70).fill(11), ...prompts]) {
      const id = engine.outcomes.size
      engine.submit(id, sequenceRequest({ prompt, maxTokens: 1 }))
      while (!engine.core.idle) {
        engine.step()
        engine.core.check()
      }
    }
    engine.settle()
    assert.equal(engine.core.snapshot().prefixEvictions, 0)
    const again = prompts.map((_, i) => engine.outcome(11 + i).cachedTokens)
    assert.deepEqual(again, Array(10).fill(5))
    const { cachedPages } = engine.core.snapshot().kv
    assert.ok(cachedPages <= core.prefixPages, `${cachedPages} pages are cached in memory`)
  }
})

test('what leads to a prefix that is being brought back goes meanwhile', () => {
  const core = { maxSequences: 1, kvPages: 100, prefixPages: 20 }
  const engine = bench({ ...core, stepTokens: 64 }, { capacity: 100 })
  const run = (id: number, prompt: number[]) => {
    engine.submit(id, sequenceRequest({ prompt: Int32Array.from(prompt), maxTokens: 1 }))
    while (!engine.core.idle) {
      engine.step()
      engine.core.check()
    }
    engine.settle()
  }
  const begin = Array(10).fill(1)
  const long = [...begin, ...Array(20).fill(2)]
  run(0, long)
  const [session] = engine.core.answer({ kind: 'sessions', tenant: 'default' })
  engine.core.answer({ kind: 'offload', tenant: 'default', id: session!.id })
  engine.settle()
  // The beginning is in memory again, and fills the cache with what follows it here.
  run(1, [...begin, ...Array(10).fill(3)])
  run(2, [...long, 4])
  assert.deepEqual(
    engine.outcome(2).tokens,
    expectedOutcome(sequenceRequest({ prompt: Int32Array.from([...long, 4]), maxTokens: 1 }))
      .tokens,
  )
})
