// Catches KV that comes back to a GPU as another's, too early, or never: sequences and prefixes that
// go to memory of the host and on to a disk, on a driver that punishes every misuse of its memory.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { HashingBackend, mockGpu } from '../../../test/support/hashing-backend.ts'
import { MemoryDisk } from '../../../test/support/memory-disk.ts'
import { MockCuda } from '../../../test/support/mock-cuda.ts'
import { Bench, VOCAB } from '../../../test/support/null-engine.ts'
import { Random } from '../../../test/support/random.ts'
import { loads, runLoad } from '../../../test/support/sharing-load.ts'
import type { HostTier } from './host-tier.ts'

/** 1.6 tokens a page: 80 tokens need 50 pages. A page of the host has 4 KiB at least. */
const KV = { layers: 2, rowBytes: 1280, pageBytes: 4096 }

const tiers = fc.record({
  frames: fc.integer({ min: 2, max: 120 }),
  below: fc.constantFrom(0, 0, 10, 60),
  pollsMax: fc.constantFrom(1, 4, 20),
  faults: fc.constantFrom(0, 0, 20),
  watermarks: fc.constantFrom({ high: 0.9, low: 0.8 }, { high: 0.2, low: 0.1 }),
  comeBack: fc.constantFrom('moved' as const, 'moved' as const, undefined),
  seed: fc.nat(),
})

const waiting = fc.constantFrom({}, { overlap: true }, { chooses: true }, { chooses: true })

for (const shareColumns of [1, 8]) {
  test(`a column goes astray on its way, in groups of ${shareColumns}`, (t) => {
    const seen = { hits: 0, preemptions: 0, saved: 0 }
    const did = { offloads: 0, demotions: 0, fetches: 0, lost: 0, spilled: 0, fetched: 0, waits: 0 }
    fc.assert(
      fc.property(loads, tiers, fc.boolean(), waiting, (load, tier, latePager, wait) => {
        const random = new Random(tier.seed)
        const kvPages = load.kvPages + 2 * shareColumns
        const kv = { ...KV, shareColumns }
        const { maxSequences } = load
        const stepTokens = maxSequences + load.extraBudget
        const sizes = { vocab: VOCAB, contextLength: 80, maxSequences, stepTokens }
        const totalBytes = (kvPages + shareColumns) * kv.pageBytes
        const cuda = new MockCuda({ pageBytes: kv.pageBytes, totalBytes })
        const { waitEvent } = cuda
        cuda.waitEvent = (...to) => {
          did.waits++
          waitEvent.apply(cuda, to)
        }
        let disk: MemoryDisk | undefined
        const polls = () => 1 + random.below(tier.pollsMax)
        const fails = () => random.below(100) < tier.faults
        const below = tier.below > 0 && {
          below: (pages: ConstructorParameters<typeof MemoryDisk>[0]) =>
            (disk = new MemoryDisk(pages, tier.below, polls, fails)),
        }
        const options = { ...sizes, kvPages, kv, ...wait, tier: { frames: tier.frames, ...below } }
        const gpu = new HashingBackend(mockGpu(cuda, latePager), options)
        const { watermarks, comeBack } = tier
        const engine = new Bench(gpu, { ...load, kvPages, greedy: true, watermarks, comeBack })
        runLoad(engine, { ...load, kvPages }, seen, () => {
          gpu.kv.check()
          ;(gpu.kv.tier as HostTier).places.check()
          cuda.advanceSome(() => random.below(3) > 0)
        })
        const after = engine.core.snapshot().tier!
        if (load.prefixPages === 0) assert.equal(after.usedBytes, 0, 'places are left behind')
        for (const name of ['offloads', 'demotions', 'fetches', 'lost'] as const) {
          did[name] += after[name]
        }
        did.spilled += disk?.moved.save ?? 0
        did.fetched += disk?.moved.load ?? 0
        gpu.close()
        cuda.assertClean()
      }),
      { seed: 23, numRuns: 150, endOnFailure: true },
    )
    t.diagnostic(JSON.stringify({ ...seen, ...did }))
    assert.ok(Object.values(did).every((count) => count > 20), JSON.stringify(did))
  })
}
