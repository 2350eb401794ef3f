// Catches GPU memory that is unmapped under a step, mapped too late, another sequence's, lost, or
// kept: the policy of src/kv/ on a driver that punishes every misuse.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { MockGpuBackend, type MockGpuOptions } from '../../../test/support/mock-gpu-backend.ts'
import { Bench, VOCAB } from '../../../test/support/null-engine.ts'
import { loads, runLoad } from '../../../test/support/sharing-load.ts'

/** 1.6 tokens a page: 80 tokens need 50 pages. */
const KV = { layers: 2, rowBytes: 80, pageBytes: 256 }
const SIZES = { vocab: VOCAB, contextLength: 80, maxSequences: 8, stepTokens: 64, kvPages: 200 }

function bench(options: Partial<MockGpuOptions> & { prefixPages?: number } = {}): {
  engine: Bench
  gpu: MockGpuBackend
} {
  const all = { ...SIZES, kv: { ...KV, shareColumns: 4 }, ...options }
  const gpu = new MockGpuBackend(all)
  return { engine: new Bench(gpu, all), gpu }
}

for (const shareColumns of [1, 4, 8]) {
  test(`a token, a page or a mapping goes astray, in groups of ${shareColumns}`, () => {
    const seen = { hits: 0, preemptions: 0, saved: 0 }
    const did = { splits: 0, boundaryCopies: 0, fenceWaits: 0, lateSteps: 0 }
    fc.assert(
      fc.property(loads, fc.boolean(), fc.boolean(), (load, latePager, overlap) => {
        // Shared in groups, a prefix may cost a group more.
        const kvPages = load.kvPages + 2 * shareColumns
        const kv = { ...KV, shareColumns }
        const stepTokens = load.maxSequences + load.extraBudget
        const { engine, gpu } = bench({ ...load, stepTokens, kvPages, kv, latePager, overlap })
        runLoad(engine, { ...load, kvPages }, seen, ({ residentBytes, pageBytes }) => {
          gpu.kv.check()
          assert.ok(residentBytes <= kvPages * pageBytes, 'memory keeps to its limit')
        })
        const { usedPages, pageBytes } = engine.core.snapshot().kv
        const held = gpu.kv.residentBytes() - usedPages * pageBytes
        // What lapsed beside a cached prefix, in a frame of both, stays until it is needed.
        assert.ok(held <= usedPages * pageBytes * shareColumns, `${held} B idle, not given back`)
        if (shareColumns === 1) assert.equal(held, 0)
        for (const [name, count] of Object.entries(gpu.kv.counters)) {
          if (name in did) did[name as keyof typeof did] += count
        }
        gpu.close()
        gpu.cuda.assertClean()
      }),
      { seed: 17, numRuns: 200 },
    )
    assert.ok(seen.hits > 500 && seen.preemptions > 50, JSON.stringify(seen))
    assert.ok(did.boundaryCopies > 100 && did.lateSteps > 100, JSON.stringify(did))
    assert.ok(did.fenceWaits > 10, JSON.stringify(did))
    if (shareColumns > 1) assert.ok(did.splits > 10, JSON.stringify(did))
  })
}
