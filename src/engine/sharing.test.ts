// Catches sharing that changes an answer, keeps or loses memory, computes twice what it need not,
// or shows one tenant what another has asked.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { Bench, expectedOutcome, sequenceRequest, VOCAB } from '../../test/support/null-engine.ts'
import { NullBackend } from '../backends/null/backend.ts'
import { LatticeError } from '../errors.ts'
import { EVICTION_NAMES, type EvictionName } from '../kv/eviction.ts'
import { GREEDY, type SequenceRequest } from './api.ts'

/** 3.2 tokens a page, so that rows lie across pages; two layers. */
const KV = { layers: 2, rowBytes: 80, pageBytes: 256 }
const CONTEXT = 80

interface Options {
  maxSequences: number
  stepTokens: number
  kvPages: number
  prefixPages: number
  greedy: boolean
  prefixEviction: EvictionName
  prefixOutput: boolean
}

function bench(options: Partial<Options> = {}): Bench {
  const { maxSequences = 8, stepTokens = 64, kvPages = 10_000, ...prefix } = options
  const sizes = { vocab: VOCAB, contextLength: CONTEXT, maxSequences, stepTokens, kv: KV }
  return new Bench(new NullBackend(sizes), { maxSequences, kvPages, greedy: true, ...prefix })
}

/** Prompts of a few words, so that they begin alike. */
const prompts = fc
  .array(fc.constantFrom([1, 2, 3, 4, 5], [1, 2, 9], [6], [7, 8, 7, 8, 7, 8, 7]), {
    minLength: 1,
    maxLength: 6,
  })
  .map((words) => Int32Array.from(words.flat()))

const loads = fc.record({
  maxSequences: fc.integer({ min: 2, max: 6 }),
  extraBudget: fc.nat(30),
  // One sequence of 80 tokens needs 50 pages.
  kvPages: fc.integer({ min: 50, max: 110 }),
  prefixPages: fc.constantFrom(0, 12, 50, 50),
  greedy: fc.boolean(),
  prefixEviction: fc.constantFrom(...EVICTION_NAMES),
  prefixOutput: fc.boolean(),
  arrivals: fc.array(
    fc.record({
      prompt: prompts,
      choices: fc.constantFrom(1, 1, 2, 5),
      tenant: fc.constantFrom('a', 'a', 'b'),
      maxTokens: fc.oneof(fc.integer({ min: 1, max: 3 }), fc.integer({ min: 10, max: 36 })),
      temperature: fc.constantFrom(0, 1),
      seed: fc.nat(1000),
      gap: fc.nat(4),
      pinned: fc.constantFrom(true, false, false, false),
      // A fifth of the choices is aborted.
      abortAfter: fc.nat(40).chain((at) => fc.constantFrom(at, ...Array(4).fill(undefined))),
    }),
    { minLength: 3, maxLength: 9 },
  ),
})

test('sharing changes a token, exceeds the limit, or leaves a page behind', () => {
  let [hits, preemptions, saved, pins] = [0, 0, 0, 0]
  fc.assert(
    fc.property(loads, ({ extraBudget, arrivals, ...options }) => {
      const stepTokens = options.maxSequences + extraBudget
      const engine = bench({ ...options, stepTokens })
      const requests: SequenceRequest[] = []
      const events: { at: number; act: () => void }[] = []
      let at = 0
      arrivals.forEach(({ choices, gap, abortAfter, temperature, seed, pinned, ...arrival }) => {
        at += gap
        const pin = pinned ? { pin: arrival.prompt.join() } : {}
        const request = sequenceRequest({ ...arrival, ...pin })
        const first = requests.length
        const ids = Array.from({ length: choices }, (_, choice) => first + choice)
        const samplings = ids.map((_, i) => ({ ...GREEDY, temperature, seed: seed + i }))
        for (const sampling of samplings) requests.push({ ...request, sampling })
        events.push({ at, act: () => engine.submitChoices(ids, request, samplings) })
        if (abortAfter === undefined) return
        for (const id of ids.filter((_, i) => i !== 1)) {
          events.push({ at: at + abortAfter, act: () => engine.core.abort(id) })
        }
      })
      for (let step = 0; events.length > 0 || !engine.core.idle; step++) {
        for (const event of events.filter((event) => event.at === step)) {
          events.splice(events.indexOf(event), 1)
          event.act()
        }
        engine.step()
        engine.core.check()
        const { usedPages, pageBytes, residentBytes } = engine.core.snapshot().kv
        assert.ok(usedPages <= options.kvPages, 'the limit is exceeded')
        assert.ok(residentBytes <= usedPages * pageBytes, 'memory is used that nobody counted')
        assert.ok(step < 5000, 'it does not end')
      }
      engine.settle()
      const { kv, prefixHits, preemptions: preempted, promptTokens } = engine.core.snapshot()
      hits += prefixHits
      preemptions += preempted
      const { map } = engine.core.answer({ kind: 'map' })
      assert.equal(
        map.totals['preempt']?.count ?? 0,
        preempted,
        'a preemption is not in the history',
      )
      const counted = Object.values(map.pages).reduce((a, b) => a + b, 0)
      assert.equal(counted, kv.usedPages, 'the map has other pages')
      const all = requests.reduce((sum, { prompt }) => sum + prompt.length, 0)
      if (promptTokens < all) saved++
      assert.ok(kv.usedPages <= options.prefixPages, 'pages are left behind')
      assert.equal(kv.residentBytes, kv.usedPages * kv.pageBytes)
      pins += ['a', 'b'].flatMap((tenant) => engine.core.answer({ kind: 'pinned', tenant })).length
      requests.forEach((request, id) => {
        const { tokens, reason, outputTokens, error } = engine.outcome(id)
        const expected = expectedOutcome(request)
        if (error) {
          assert.ok(request.pin !== undefined && error.code === 'prefix_memory_exhausted')
        } else if (reason === 'abort') {
          assert.deepEqual(tokens, expected.tokens.slice(0, tokens.length))
        } else assert.deepEqual({ tokens, reason, outputTokens }, expected)
      })
    }),
    { seed: 17, numRuns: 600 },
  )
  const counts = `${hits} ${preemptions} ${saved} ${pins}`
  assert.ok(hits > 2000 && preemptions > 200 && saved > 300 && pins > 100, counts)
})

test('choices of one request compute their prompt more than once', () => {
  for (const prefixPages of [0, 100]) {
    const engine = bench({ prefixPages, stepTokens: 16 })
    const prompt = Int32Array.from({ length: 37 }, (_, i) => i)
    const ids = [0, 1, 2, 3, 4, 5]
    const samplings = ids.map((seed) => ({ ...GREEDY, temperature: 1, seed }))
    engine.submitChoices(ids, sequenceRequest({ prompt }), samplings)
    // Who comes later waits for nobody.
    engine.submit(6, sequenceRequest())
    engine.runAll()
    assert.equal(engine.core.snapshot().promptTokens, 37 + 3)
    samplings.forEach((sampling, id) => {
      const { tokens } = expectedOutcome(sequenceRequest({ prompt, sampling }))
      assert.deepEqual(engine.outcome(id).tokens, tokens)
      assert.equal(engine.outcome(id).cachedTokens, 0, 'a choice counts as a hit of another')
    })
  }
})

test('choices that share a prompt take its pages each', () => {
  const engine = bench()
  const prompt = new Int32Array(40).fill(3)
  const ids = [0, 1, 2, 3, 4, 5, 6, 7]
  engine.submitChoices(
    ids,
    sequenceRequest({ prompt, maxTokens: 10 }),
    ids.map(() => GREEDY),
  )
  engine.step()
  const { kv, running } = engine.core.snapshot()
  assert.equal(running, 8)
  // 40 tokens fill 12.5 pages a layer: all have the 13th together until they write to it.
  assert.equal(kv.usedPages, 2 * 13)
  engine.step()
  const { kv: diverged } = engine.core.snapshot()
  assert.equal(diverged.usedPages, 2 * (12 + 8))
  assert.equal(diverged.residentBytes, diverged.usedPages * kv.pageBytes)
  const { pages, tokenBytes, fragmentation } = engine.core.answer({ kind: 'map' }).map
  assert.deepEqual(pages, { live: 2 * 7, shared: 2 * 13, pinned: 0, cached: 0, warm: 0, moving: 0 })
  // 41 tokens of 80 bytes a layer: 208 of each 13th page.
  assert.equal(tokenBytes, 2 * (12 * 256 + 8 * 208))
  assert.ok(Math.abs(fragmentation - 0.075) < 1e-9)
})

test('a prefix within a page is missed, or one of another tenant is hit', () => {
  const engine = bench({ prefixPages: 1000 })
  const prompt = Int32Array.from({ length: 50 }, (_, i) => (i * 7) % VOCAB)
  let id = 0
  const cached = (change: Partial<SequenceRequest>) => {
    engine.submit(id, sequenceRequest({ maxTokens: 2, ...change }))
    engine.runAll()
    return engine.outcome(id++).cachedTokens
  }
  assert.equal(cached({ prompt, tenant: 'a' }), 0)
  assert.equal(cached({ prompt, tenant: 'b' }), 0)
  assert.equal(cached({ prompt, tenant: 'a' }), 49, 'the last token is computed, no other')
  for (const common of [1, 3, 4, 17, 18, 19, 48]) {
    const other = prompt.slice()
    other[common] = (other[common]! + 1) % VOCAB
    assert.equal(cached({ prompt: other, tenant: 'a' }), common)
  }
  assert.equal(cached({ prompt: prompt.slice(0, 20), tenant: 'b' }), 19)
  assert.equal(cached({ prompt, tenant: '' }), 0)
  const { prefixHits, prefixQueries } = engine.core.snapshot()
  assert.equal(prefixQueries, 11 * 50 + 20)
  assert.equal(prefixHits, 49 + 110 + 19)
})

test('a watched prefix goes unnoticed, or is said to have gone while it is there', () => {
  let [found, gone] = [0, 0]
  const requests = fc.array(
    fc.record({ tenant: fc.constantFrom('a', 'b'), prompt: prompts, cut: fc.nat(40) }),
    { minLength: 5, maxLength: 40 },
  )
  fc.assert(
    fc.property(requests, (list) => {
      const engine = bench({ prefixPages: 24 })
      const watched = new Map<string, { tenant: string; tokens: Int32Array }>()
      const isCached = (tenant: string, tokens: Int32Array, id: string): boolean => {
        const prefixes = [{ id, length: tokens.length }]
        const answer = engine.core.answer({ kind: 'watch', tenant, tokens, prefixes })
        return answer.length === 1
      }
      list.forEach(({ tenant, prompt, cut }, i) => {
        engine.submit(i, sequenceRequest({ tenant, prompt, maxTokens: 1 }))
        engine.runAll()
        engine.core.check()
        for (const id of engine.core.answer({ kind: 'forgotten' })) {
          // Those that only a check below asked about are not counted.
          if (watched.delete(id)) gone++
        }
        for (const { tenant: owner, tokens } of watched.values()) {
          assert.ok(isCached(owner, tokens, 'check'), 'it has gone, and nobody said so')
        }
        const tokens = prompt.slice(0, 1 + (cut % prompt.length))
        if (!isCached(tenant, tokens, `${i}`)) return
        watched.set(`${i}`, { tenant, tokens })
        found++
        // What the engine itself finds when such a prompt comes; one token is always computed.
        const longer = Int32Array.from([...tokens, 0])
        engine.submit(1000 + i, sequenceRequest({ tenant, prompt: longer, maxTokens: 1 }))
        engine.runAll()
        assert.equal(engine.outcome(1000 + i).cachedTokens, tokens.length)
      })
    }),
    { seed: 23, numRuns: 100 },
  )
  assert.ok(found > 500 && gone > 100, `${found} ${gone}`)
})

test('memory that a cached prefix cannot give back passes for the error of a sequence', () => {
  const engine = bench({ prefixPages: 10 })
  const prompt = (token: number) => new Int32Array(20).fill(token)
  engine.submit(0, sequenceRequest({ prompt: prompt(1), maxTokens: 1 }))
  engine.runAll()
  engine.settle()
  const { kv } = engine.backend
  const discard = kv.discard.bind(kv)
  kv.discard = () => {
    kv.discard = discard
    throw new LatticeError('os_call_failed', 'no')
  }
  engine.submit(1, sequenceRequest({ prompt: prompt(2), maxTokens: 4 }))
  assert.throws(() => engine.step(), { code: 'os_call_failed' })
  assert.equal(engine.outcome(1).reason, undefined)
})
