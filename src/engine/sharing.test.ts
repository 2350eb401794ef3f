// Catches sharing that changes an answer, keeps or loses memory, computes twice what it need not,
// or shows one tenant what another has asked.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { Bench, expectedOutcome, sequenceRequest, VOCAB } from '../../test/support/null-engine.ts'
import { pinningLoads, prompts, runLoad } from '../../test/support/sharing-load.ts'
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

const policies = fc.record({
  greedy: fc.boolean(),
  prefixEviction: fc.constantFrom(...EVICTION_NAMES),
  prefixOutput: fc.boolean(),
})

test('sharing changes a token, exceeds the limit, or leaves a page behind', () => {
  const seen = { hits: 0, preemptions: 0, saved: 0 }
  let pins = 0
  fc.assert(
    fc.property(pinningLoads, policies, (load, policy) => {
      const { maxSequences, extraBudget, kvPages, prefixPages } = load
      const stepTokens = maxSequences + extraBudget
      const engine = bench({ maxSequences, kvPages, prefixPages, stepTokens, ...policy })
      runLoad(engine, load, seen, ({ usedPages, pageBytes, residentBytes }) => {
        assert.ok(residentBytes <= usedPages * pageBytes, 'memory is used that nobody counted')
      })
      const { kv, preemptions } = engine.core.snapshot()
      const { map } = engine.core.answer({ kind: 'map' })
      const told = map.totals['preempt']?.count ?? 0
      assert.equal(told, preemptions, 'a preemption is not in the history')
      const counted = Object.values(map.pages).reduce((a, b) => a + b, 0)
      assert.equal(counted, kv.usedPages, 'the map has other pages')
      assert.equal(kv.residentBytes, kv.usedPages * kv.pageBytes)
      pins += ['a', 'b'].flatMap((tenant) => engine.core.answer({ kind: 'pinned', tenant })).length
    }),
    { seed: 17, numRuns: 600 },
  )
  const { hits, preemptions, saved } = seen
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

test('requests of several choices begin one a step', () => {
  const engine = bench()
  const ids = Array.from({ length: 6 }, (_, id) => id)
  for (const first of [0, 2, 4]) {
    const request = sequenceRequest({ prompt: new Int32Array(10).fill(first) })
    engine.submitChoices([first, first + 1], request, [GREEDY, GREEDY])
  }
  engine.step()
  assert.deepEqual(
    ids.map((id) => engine.outcome(id).tokens.length),
    ids.map(() => 1),
  )
  assert.equal(engine.core.snapshot().promptTokens, 30)
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

test('who lacks what it shares with the cache, with nobody beside it, lacks it twice', () => {
  // Memory for the one sequence, and no page more: what its prompt ends in, it copies.
  const context = Int32Array.from({ length: 20 }, (_, i) => i)
  const kv = { layers: 1, rowBytes: 64, pageBytes: 256 }
  const sizes = { vocab: VOCAB, contextLength: 20, maxSequences: 1, stepTokens: 32, kv }
  const asked = (tokens: number, maxTokens: number): SequenceRequest =>
    sequenceRequest({ prompt: context.slice(0, tokens), maxTokens })
  let preemptions = 0
  for (let short = 2; short < 8; short++) {
    for (let long = short; long < 10; long++) {
      for (let tokens = long; tokens < 12; tokens++) {
        const options = { maxSequences: 1, kvPages: 5, prefixPages: 3 }
        const engine = new Bench(new NullBackend(sizes), options)
        const last = asked(tokens, 20 - tokens)
        for (const [id, request] of [asked(short, 1), asked(long, 1), last].entries()) {
          engine.submit(id, request)
          engine.runAll()
        }
        assert.deepEqual(engine.outcome(2).tokens, expectedOutcome(last).tokens)
        const times = engine.core.snapshot().preemptions
        assert.ok(times <= 1, `after ${short} and ${long} of ${tokens}, ${times} times`)
        preemptions += times
      }
    }
  }
  assert.ok(preemptions > 0)
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
