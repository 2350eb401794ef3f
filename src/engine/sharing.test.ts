// Catches sharing that changes an answer, keeps or loses memory, computes twice what it need not,
// or shows one tenant what another has asked.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { Bench, expectedOutcome, sequenceRequest, VOCAB } from '../../test/support/null-engine.ts'
import { loads, runLoad } from '../../test/support/sharing-load.ts'
import { NullBackend } from '../backends/null/backend.ts'
import { GREEDY, type SequenceRequest } from './api.ts'

/** 3.2 tokens a page, so that rows lie across pages; two layers. */
const KV = { layers: 2, rowBytes: 80, pageBytes: 256 }
const CONTEXT = 80

interface Options {
  maxSequences: number
  stepTokens: number
  kvPages: number
  prefixPages: number
}

function bench(options: Partial<Options> = {}): Bench {
  const { maxSequences = 8, stepTokens = 64, kvPages = 10_000, prefixPages = 0 } = options
  const sizes = { vocab: VOCAB, contextLength: CONTEXT, maxSequences, stepTokens, kv: KV }
  return new Bench(new NullBackend(sizes), { maxSequences, kvPages, prefixPages })
}

test('sharing changes a token, exceeds the limit, or leaves a page behind', () => {
  const seen = { hits: 0, preemptions: 0, saved: 0 }
  fc.assert(
    fc.property(loads, (load) => {
      const engine = bench({ ...load, stepTokens: load.maxSequences + load.extraBudget })
      runLoad(engine, load, seen, ({ usedPages, pageBytes, residentBytes }) => {
        assert.ok(residentBytes <= usedPages * pageBytes, 'memory is used that nobody counted')
      })
      const { kv } = engine.core.snapshot()
      assert.equal(kv.residentBytes, kv.usedPages * kv.pageBytes)
    }),
    { seed: 17, numRuns: 600 },
  )
  const { hits, preemptions, saved } = seen
  assert.ok(hits > 2000 && preemptions > 200 && saved > 300, `${hits} ${preemptions} ${saved}`)
})

test('choices of one request compute their prompt more than once', () => {
  for (const prefixPages of [0, 100]) {
    const engine = bench({ prefixPages, stepTokens: 16 })
    const prompt = Int32Array.from({ length: 37 }, (_, i) => i)
    for (let id = 0; id < 6; id++) {
      const sampling = { ...GREEDY, temperature: 1, seed: id }
      engine.submit(id, sequenceRequest({ prompt, group: 'g', sampling, maxTokens: 1 + id }))
    }
    // Who comes later waits for nobody.
    engine.submit(6, sequenceRequest())
    engine.runAll()
    assert.equal(engine.core.snapshot().promptTokens, 37 + 3)
    for (let id = 0; id < 6; id++) {
      const sampling = { ...GREEDY, temperature: 1, seed: id }
      const { tokens } = expectedOutcome(sequenceRequest({ prompt, sampling, maxTokens: 1 + id }))
      assert.deepEqual(engine.outcome(id).tokens, tokens)
      assert.equal(engine.outcome(id).cachedTokens, 0, 'a choice counts as a hit of another')
    }
  }
})

test('choices that share a prompt take its pages each', () => {
  const engine = bench()
  const prompt = new Int32Array(40).fill(3)
  for (let id = 0; id < 8; id++) {
    engine.submit(id, sequenceRequest({ prompt, group: 'g', maxTokens: 10 }))
  }
  engine.step()
  const { kv, running } = engine.core.snapshot()
  assert.equal(running, 8)
  // 40 tokens fill 12.5 pages a layer; each choice has the 13th of its own.
  assert.equal(kv.usedPages, 2 * (12 + 8))
  assert.equal(kv.residentBytes, kv.usedPages * kv.pageBytes)
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

test('a group of different prompts is taken for one', () => {
  const engine = bench()
  engine.submit(0, sequenceRequest({ group: 'g' }))
  engine.submit(1, sequenceRequest({ group: 'g', prompt: Int32Array.of(1, 2, 4) }))
  engine.runAll()
  assert.equal(engine.outcome(1).error?.code, 'invalid_request')
  assert.deepEqual(engine.outcome(0).tokens, expectedOutcome(sequenceRequest()).tokens)
})
