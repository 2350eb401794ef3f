// Catches a beam search in the engine that finds something else than a plain one, alone or beside
// others, under memory pressure or not, and memory that it keeps or promises twice.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import {
  assertBeams,
  beamArrivals,
  columnsNeeded,
  runBeamLoad,
} from '../../test/support/beam-load.ts'
import {
  Bench,
  expectedBeams,
  expectedOutcome,
  logprobsAfter,
  sequenceRequest,
  VOCAB,
} from '../../test/support/null-engine.ts'
import { NullBackend } from '../backends/null/backend.ts'
import { extendHash } from '../backends/null/kv-memory.ts'
import { LatticeError } from '../errors.ts'
import { type BeamParams, GREEDY, type SequenceRequest } from './api.ts'

/** 3.2 tokens a page, so that rows lie across pages; two layers. */
const KV = { layers: 2, rowBytes: 80, pageBytes: 256 }
const CONTEXT = 80
const BEAMS: BeamParams = { width: 4, lengthPenalty: 1, earlyStopping: false }

interface Options {
  maxSequences: number
  stepTokens: number
  kvPages: number
  prefixPages: number
  layers: number
  tierColumns: number
}

function bench(options: Partial<Options> = {}): Bench {
  const { maxSequences = 8, stepTokens = 64, kvPages = 10_000, prefixPages = 0 } = options
  const kv = { ...KV, layers: options.layers ?? KV.layers }
  const { tierColumns = 0 } = options
  const sizes = { vocab: VOCAB, contextLength: CONTEXT, maxSequences, stepTokens, kv, tierColumns }
  const memory = { maxSequences, kvPages, prefixPages, greedy: true }
  return new Bench(new NullBackend(sizes), { ...memory, comeBack: 'moved' })
}

const loads = fc.record({
  maxSequences: fc.integer({ min: 5, max: 9 }),
  extraBudget: fc.nat(30),
  extraColumns: fc.nat(12),
  prefixPages: fc.constantFrom(0, 30),
  tierColumns: fc.constantFrom(0, 50),
  // Few regions may be mixed in a slot of so many layers: then beams are copied in part.
  layers: fc.constantFrom(2, 2, 700),
  arrivals: beamArrivals,
})

test('pressure, aborts or others beside them change the hypotheses of a beam search', () => {
  const seen = { searches: 0, preemptions: 0, compactions: 0 }
  fc.assert(
    fc.property(loads, ({ extraBudget, extraColumns, arrivals, layers, ...options }) => {
      const kvPages =
        (columnsNeeded(arrivals, { bytes: KV.rowBytes, pageBytes: KV.pageBytes }) + extraColumns) *
        layers
      const stepTokens = options.maxSequences + extraBudget
      const prefixPages = options.prefixPages * layers
      const engine = bench({ ...options, prefixPages, layers, kvPages, stepTokens })
      runBeamLoad(engine, arrivals, seen, ({ usedPages, pageBytes, residentBytes }) => {
        assert.ok(usedPages <= kvPages, 'the limit is exceeded')
        assert.ok(residentBytes <= usedPages * pageBytes, 'memory is used that nobody counted')
      })
      engine.settle()
      const { kv, running } = engine.core.snapshot()
      assert.equal(running, 0)
      assert.ok(kv.usedPages <= prefixPages, 'pages are left behind')
      assert.equal(kv.residentBytes, kv.usedPages * kv.pageBytes)
    }),
    { seed: 23, numRuns: 300 },
  )
  const { searches, preemptions, compactions } = seen
  assert.ok(searches > 300 && preemptions > 50 && compactions > 50, JSON.stringify(seen))
})

test('a beam search gives way in part, or goes on with the memory of a beam that is gone', () => {
  // Early sequences grow until the beams, which fitted when they were let in, must give way.
  const long = sequenceRequest({ prompt: new Int32Array(20).fill(3), maxTokens: 55 })
  const beams = sequenceRequest({ prompt: Int32Array.of(5, 6), maxTokens: 30, beams: BEAMS })
  const engine = bench({ kvPages: 2 * 42 })
  engine.submitChoices([0, 3, 4], long, [GREEDY, GREEDY, GREEDY])
  for (let i = 0; i < 3; i++) engine.step()
  engine.submitChoices([1, 2], beams, [GREEDY, GREEDY])
  let restarts = 0
  let before = 0
  while (engine.step()) {
    engine.core.check()
    const { sequences, preemptions } = engine.core.snapshot()
    const of = sequences.filter(({ promptTokens }) => promptTokens === 2)
    assert.ok([0, 1, 4].includes(of.length), `${of.length} beams`)
    if (preemptions > before && of.length === 1) restarts++
    before = preemptions
  }
  assert.ok(restarts > 0, 'the beams never gave way')
  assert.deepEqual(engine.outcome(0).tokens, expectedOutcome(long).tokens)
  assertBeams(engine, beams, [1, 2])
})

test('beams begin again although there is a disk, or write twice what they share', () => {
  // The beams share their prompt with a sequence that goes on.
  const prompt = Int32Array.from({ length: 24 }, (_, i) => i)
  const long = sequenceRequest({ prompt, maxTokens: 50 })
  const others = sequenceRequest({ prompt: Int32Array.of(9), maxTokens: 70 })
  const beams = sequenceRequest({ prompt, maxTokens: 40, beams: BEAMS })
  for (const prefixPages of [0, 2 * 12]) {
    const engine = bench({ kvPages: 2 * 60, tierColumns: 100, prefixPages })
    engine.submit(0, long)
    engine.submitChoices([3, 4], others, [GREEDY, { ...GREEDY, seed: 2 }])
    engine.step()
    engine.submitChoices([1, 2], beams, [GREEDY, GREEDY])
    let [moved, before] = [0, 0]
    while (!engine.core.idle) {
      engine.step()
      engine.core.check()
      const { sequences, tier, kv } = engine.core.snapshot()
      const state = sequences.at(-1)?.state
      const used = kv.usedPages / 2
      if (state === 'offloading') before = used
      else if (state === 'offloaded' && before > 0) {
        moved++
        const onDisk = tier!.usedBytes / (2 * KV.pageBytes)
        // The others take at most a column each meanwhile.
        assert.ok(onDisk <= before - used + 3, `${onDisk} columns for ${before} − ${used}`)
        before = 0
      }
    }
    assert.ok(moved > 0, 'the beams never gave way')
    const { promptTokens, tier } = engine.core.snapshot()
    assert.ok(promptTokens <= 24 + 24 + 1, `${promptTokens} tokens of prompts were computed`)
    assert.ok(tier!.offloads >= 4 && tier!.usedBytes === 0)
    assert.deepEqual(engine.outcome(0).tokens, expectedOutcome(long).tokens)
    assertBeams(engine, beams, [1, 2])
  }
})

test('a beam search that cannot run is queued for ever', () => {
  const engine = bench({ maxSequences: 3, kvPages: 2 * 30 })
  const refused = (change: Partial<SequenceRequest>, answers = 1) => {
    const ids = Array.from({ length: answers }, (_, i) => i)
    const request = sequenceRequest({ beams: { ...BEAMS, width: 3 }, ...change })
    engine.submitChoices(ids, request, [])
    assert.ok(engine.core.idle)
    return ids.map((id) => engine.outcome(id).error?.code)
  }
  assert.deepEqual(refused({ beams: BEAMS }), ['invalid_request'])
  assert.deepEqual(refused({}, 4), Array(4).fill('invalid_request'))
  assert.deepEqual(refused({ beams: { ...BEAMS, width: 1 } }), ['invalid_request'])
  assert.deepEqual(refused({ sampling: { ...GREEDY, temperature: 1 } }), ['invalid_request'])
  assert.deepEqual(refused({ maxTokens: 60 }), ['kv_memory_exhausted'])
  assert.equal(engine.core.snapshot().finished.error, 8)
})

test('beams that pinned prefixes leave no room begin again for ever', () => {
  const sizes = { vocab: VOCAB, contextLength: 40, maxSequences: 8, stepTokens: 64, kv: KV }
  const memory = { maxSequences: 8, kvPages: 2 * 45, prefixPages: 2 * 45 }
  const engine = new Bench(new NullBackend(sizes), memory)
  for (const id of [4, 5]) {
    const prompt = new Int32Array(39).fill(id)
    engine.submit(id, sequenceRequest({ prompt, maxTokens: 1, pin: `${id}` }))
  }
  engine.runAll()
  const request = sequenceRequest({
    maxTokens: 12,
    beams: { ...BEAMS, width: 8, lengthPenalty: 9 },
  })
  engine.submitChoices([1, 2], request, [])
  engine.submit(3, sequenceRequest())
  engine.runAll(500)
  const { kv, preemptions } = engine.core.snapshot()
  assert.equal(kv.pinnedPages, 2 * 26)
  assert.equal(preemptions, 8, 'its beams were refused at once, or let in more than once')
  for (const id of [1, 2]) assert.equal(engine.outcome(id).error?.code, 'kv_memory_exhausted')
  assert.deepEqual(engine.outcome(3).tokens, expectedOutcome(sequenceRequest()).tokens)
})

test('beams that wait for what others leave give way themselves', () => {
  // Three columns: the beams' prompt has one, and the others' two are what its forks lack.
  const sizes = { maxSequences: 4, stepTokens: 4, kvPages: 2 * 3, tierColumns: 20 }
  const beams = sequenceRequest({
    prompt: Int32Array.of(5),
    maxTokens: 2,
    beams: { ...BEAMS, width: 3 },
  })
  const late = sequenceRequest({ prompt: Int32Array.of(1, 2, 3, 4, 6), maxTokens: 1 })
  const engine = bench(sizes)
  engine.submitChoices([1], beams, [GREEDY])
  engine.submit(2, late)
  engine.runAll(100)
  assertBeams(engine, beams, [1])
  assert.deepEqual(engine.outcome(2).tokens, expectedOutcome(late).tokens)
  assert.equal(engine.core.snapshot().preemptions, 1)
})

test('an answer that nobody waits for ends the others, or beams run on for nobody', () => {
  const request = sequenceRequest({ maxTokens: 20, beams: BEAMS })
  const engine = bench()
  engine.submitChoices([0, 1, 2], request, [])
  for (let i = 0; i < 5; i++) engine.step()
  engine.core.abort(1)
  assert.equal(engine.outcome(1).reason, 'abort')
  engine.runAll()
  const expected = expectedBeams(request)
  assert.deepEqual(engine.outcome(0).tokens, expected[0]!.tokens)
  assert.deepEqual(engine.outcome(2).tokens, expected[2]!.tokens)
  engine.submitChoices([3, 4], request, [])
  for (let i = 0; i < 5; i++) engine.step()
  engine.core.abort(3)
  engine.core.abort(4)
  assert.ok(engine.core.idle)
  assert.equal(engine.step(), false)
  engine.settle()
  assert.equal(engine.core.snapshot().kv.residentBytes, 0)
})

test('a row of NaN leaves beams behind, or ends another sequence', () => {
  for (const atStep of [0, 4]) {
    const sizes = { vocab: VOCAB, contextLength: CONTEXT, maxSequences: 8, stepTokens: 64, kv: KV }
    const backend = new NullBackend({ ...sizes, fault: { atStep, kind: 'nan' } })
    const engine = new Bench(backend, { maxSequences: 8, kvPages: 10_000 })
    engine.submitChoices([0, 1], sequenceRequest({ maxTokens: 20, beams: BEAMS }), [])
    engine.submit(2, sequenceRequest({ prompt: Int32Array.of(9) }))
    engine.runAll()
    for (const id of [0, 1]) assert.equal(engine.outcome(id).error?.code, 'backend_failed')
    assert.deepEqual(
      engine.outcome(2).tokens,
      expectedOutcome(sequenceRequest({ prompt: Int32Array.of(9) })).tokens,
    )
    engine.settle()
    assert.equal(engine.core.snapshot().kv.residentBytes, 0)
  }
})

test('log-probabilities of a beam are of another, or missing', () => {
  const request = sequenceRequest({ maxTokens: 12, beams: BEAMS, topLogprobs: 3 })
  const engine = bench()
  engine.submitChoices([0, 1], request, [])
  engine.runAll()
  for (const id of [0, 1]) {
    let hash = request.prompt.reduce(extendHash, 0)
    const { tokens, logprobs, score } = engine.outcome(id)
    assert.equal(logprobs.length, tokens.length)
    tokens.forEach((token, i) => {
      const all = logprobsAfter(hash)
      hash = extendHash(hash, token)
      assert.ok(Math.abs(logprobs[i]!.logprob - all[token]!) < 1e-5)
      const best = [...all.keys()].toSorted((a, b) => all[b]! - all[a]!).slice(0, 3)
      assert.deepEqual(
        logprobs[i]!.top.map((top) => top.token),
        best,
      )
    })
    const sum = logprobs.reduce((total, one) => total + one!.logprob, 0)
    assert.ok(Math.abs(score! - sum / tokens.length) < 1e-9)
  }
})

test('memory that cannot be mapped for a beam passes for the error of its search', () => {
  const engine = bench()
  const prompt = new Int32Array(10).fill(1)
  engine.submit(0, sequenceRequest({ prompt, beams: BEAMS, maxTokens: 4 }))
  const { kv } = engine.backend
  const map = kv.map.bind(kv)
  kv.map = () => {
    kv.map = map
    throw new LatticeError('os_call_failed', 'no')
  }
  assert.throws(() => engine.runAll(), { code: 'os_call_failed' })
  assert.equal(engine.outcome(0).reason, undefined)
})
