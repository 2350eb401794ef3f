// Catches GPU memory that is unmapped under a step, mapped too late, another sequence's, lost, or
// kept: the policy of src/kv/ on a driver that punishes every misuse.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { HashingBackend, mockGpu } from '../../../test/support/hashing-backend.ts'
import { MockCuda } from '../../../test/support/mock-cuda.ts'
import { Bench, VOCAB } from '../../../test/support/null-engine.ts'
import { loads, runLoad } from '../../../test/support/sharing-load.ts'
import { tokenMajor } from '../../kv/layout.ts'
import { CudaDevice } from './device.ts'
import { CudaKvMemory } from './kv-memory.ts'
import { InlinePager } from './pager.ts'

/** 1.6 tokens a page: 80 tokens need 50 pages. */
const KV = { layers: 2, rowBytes: 80, pageBytes: 256 }

/** A step that is still under way when the engine goes on: none, one more, or one ahead. */
const waiting = fc.constantFrom({}, { overlap: true }, { chooses: true }, { chooses: true })

for (const shareColumns of [1, 4, 8]) {
  test(`a token, a page or a mapping goes astray, in groups of ${shareColumns}`, () => {
    const seen = { hits: 0, preemptions: 0, saved: 0 }
    const did = { splits: 0, boundaryCopies: 0, fenceWaits: 0, lateSteps: 0 }
    fc.assert(
      fc.property(loads, fc.boolean(), waiting, (load, latePager, wait) => {
        // Shared in groups, a prefix may cost a group more.
        const kvPages = load.kvPages + 2 * shareColumns
        const kv = { ...KV, shareColumns }
        const stepTokens = load.maxSequences + load.extraBudget
        const sizes = { vocab: VOCAB, contextLength: 80, maxSequences: load.maxSequences }
        // The scratch memory for taking frames apart is beside the limit, and the pager's sink.
        const totalBytes = (kvPages + shareColumns + 1) * kv.pageBytes
        const cuda = new MockCuda({ pageBytes: kv.pageBytes, totalBytes })
        const options = { ...sizes, stepTokens, kvPages, kv, ...wait }
        const gpu = new HashingBackend(mockGpu(cuda, latePager), options)
        const engine = new Bench(gpu, { ...load, kvPages, greedy: true })
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
        cuda.assertClean()
      }),
      { seed: 17, numRuns: 120 },
    )
    assert.ok(seen.hits > 300 && seen.preemptions > 50, JSON.stringify(seen))
    assert.ok(did.boundaryCopies > 100 && did.lateSteps > 100, JSON.stringify(did))
    assert.ok(did.fenceWaits > 10, JSON.stringify(did))
    if (shareColumns > 1) assert.ok(did.splits > 10, JSON.stringify(did))
  })
}

test('a refused page goes while something is still copied there', () => {
  const cuda = new MockCuda({ pageBytes: 4096, totalBytes: 64 * 4096 })
  const device = CudaDevice.open(0, cuda)
  const layout = tokenMajor({ layers: 2, rowBytes: 1280, pageBytes: 4096, maxTokens: 16 })
  const limits = { slots: 2, regions: 2, limitPages: 40 }
  const kv = new CudaKvMemory(device, layout, new InlinePager(device), limits)
  const stream = cuda.createStream()
  kv.grow(0, 0, 2)
  kv.beforeStep(stream)
  kv.afterStep(stream)
  cuda.refuses = () => true
  kv.grow(1, 0, 1)
  kv.copy(1, 0, [{ region: 0, from: 0, to: 1 }])
  // Whoever it is copied from goes first: so it is copied now, to where nothing is.
  kv.discard(0, 0, 2)
  assert.deepEqual(kv.lacking(), [{ region: 1, first: 0, end: 1 }])
  kv.discard(1, 0, 1)
  assert.equal(kv.residentBytes(), 2 * 4096, 'what lapsed is there still, and no more')
  cuda.destroyStream(stream)
  kv.close()
  device.close()
  cuda.assertClean()
})
