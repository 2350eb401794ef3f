// Catches beams that find something else, or stop the engine, on a GPU's memory: there a slot shows
// its region where that lies, and frames are shared one by one.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { assertBeams, beamArrivals, columnsNeeded, runBeamLoad } from '../support/beam-load.ts'
import { HashingBackend, mockGpu } from '../support/hashing-backend.ts'
import { MockCuda } from '../support/mock-cuda.ts'
import { Bench, sequenceRequest, VOCAB } from '../support/null-engine.ts'
import { Random } from '../support/random.ts'

/** 1.6 tokens a page of 4 KiB, which a page of the host has at least. */
const KV = { layers: 2, rowBytes: 1280, pageBytes: 4096 }

const loads = fc.record({
  maxSequences: fc.integer({ min: 5, max: 9 }),
  extraBudget: fc.nat(30),
  prefixPages: fc.constantFrom(0, 30),
  frames: fc.constantFrom(0, 100),
  latePager: fc.boolean(),
  chooses: fc.boolean(),
  /** Of 100 calls for pages, so many are refused. */
  refused: fc.constantFrom(0, 0, 5, 30),
  seed: fc.nat(),
  arrivals: beamArrivals,
})

for (const shareColumns of [1, 4]) {
  test(`beams on a GPU find something else or stop it, in groups of ${shareColumns}`, (t) => {
    const seen = { searches: 0, preemptions: 0, compactions: 0, refused: 0 }
    const kv = { ...KV, shareColumns }
    const sizesOf = { bytes: KV.layers * KV.rowBytes, pageBytes: KV.pageBytes, group: shareColumns }
    fc.assert(
      fc.property(loads, (load) => {
        const { maxSequences, extraBudget, prefixPages, frames, arrivals } = load
        const kvPages = columnsNeeded(arrivals, sizesOf)
        const stepTokens = maxSequences + extraBudget
        const cuda = new MockCuda({ pageBytes: kv.pageBytes })
        const sizes = { vocab: VOCAB, contextLength: 80, maxSequences, stepTokens, kvPages, kv }
        const { chooses } = load
        const tier = frames > 0 && { tier: { frames } }
        const gpu = new HashingBackend(mockGpu(cuda, load.latePager), {
          ...sizes,
          ...tier,
          chooses,
        })
        const options = { maxSequences, kvPages, prefixPages, greedy: true } as const
        const engine = new Bench(gpu, { ...options, comeBack: 'moved' })
        const random = new Random(load.seed)
        cuda.refuses = () => {
          const refused = random.below(100) < load.refused
          if (refused) seen.refused++
          return refused
        }
        runBeamLoad(engine, arrivals, seen, ({ usedPages }) => {
          gpu.kv.check()
          // It looks now and then whether there is more memory.
          engine.nowMs += 30
          assert.ok(usedPages <= kvPages, 'the limit is exceeded')
        })
        cuda.refuses = () => false
        engine.settle()
        assert.ok(engine.core.snapshot().kv.usedPages <= prefixPages, 'pages are left behind')
        gpu.close()
        cuda.assertClean()
      }),
      { seed: 31, numRuns: 150 },
    )
    t.diagnostic(JSON.stringify(seen))
    assert.ok(seen.searches > 100 && seen.preemptions > 20, JSON.stringify(seen))
  })
}

test('beams that share no whole group of pages are let in where they have no room', () => {
  // Five tokens end in the fourth page: a group of four, of which each beam needs its own.
  const kv = { ...KV, shareColumns: 4 }
  const [kvPages, maxSequences, stepTokens] = [5 * 5 - 1, 5, 10]
  const cuda = new MockCuda({ pageBytes: kv.pageBytes })
  const sizes = { vocab: VOCAB, contextLength: 80, maxSequences, stepTokens, kvPages, kv }
  const gpu = new HashingBackend(mockGpu(cuda), sizes)
  const engine = new Bench(gpu, { maxSequences, kvPages, greedy: true })
  const beams = { width: 5, lengthPenalty: 1, earlyStopping: false as const }
  const prompt = new Int32Array(5).fill(7)
  engine.submitChoices([1], sequenceRequest({ prompt, maxTokens: 3, beams }), [])
  assert.equal(engine.outcome(1).error?.code, 'kv_memory_exhausted')
  const fits = sequenceRequest({ prompt, maxTokens: 1, beams })
  engine.submitChoices([2], fits, [])
  engine.runAll()
  assertBeams(engine, fits, [2])
  engine.settle()
  gpu.close()
  cuda.assertClean()
})
