// Catches KV that comes back to a GPU as another's, too early or never: sequences and prefixes that
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
import { temporaryDirectory } from '../../../test/support/temporary.ts'
import { tokenMajor } from '../../kv/layout.ts'
import type { PagerStart } from '../../tier/pager.ts'
import { PagerHost } from '../../tier/pager-host.ts'
import type { DiskTier } from '../../tier/tier.ts'
import { CudaDevice } from './device.ts'
import type { HostPages } from './host-pages.ts'
import { HostTier } from './host-tier.ts'
import { CudaKvMemory } from './kv-memory.ts'
import { diskBelow } from './open.ts'
import { InlinePager } from './pager.ts'

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
        checkShown(engine, gpu.kv.tier as HostTier)
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
      { seed: 23, numRuns: 200, endOnFailure: true },
    )
    t.diagnostic(JSON.stringify({ ...seen, ...did }))
    assert.ok(
      Object.values(did).every((count) => count > 5),
      JSON.stringify(did),
    )
  })
}

/** The map says of every place in use where it lies, and the snapshot how much that is. */
function checkShown({ core }: Bench, tier: HostTier): void {
  const { disk } = core.answer({ kind: 'map' }).map
  const pages = { host: 0, disk: 0 }
  for (const { first, end, tier: level } of disk!.runs) {
    pages[level] += end - first
    for (let place = first; place < end; place++) {
      assert.equal(tier.isBelow(place), level === 'disk', `place ${place} is shown as ${level}`)
    }
  }
  const { levels, usedBytes } = core.snapshot().tier!
  assert.equal(usedBytes, (pages.host + pages.disk) * KV.pageBytes)
  assert.ok(levels!.diskUsedBytes >= pages.disk * KV.pageBytes)
  assert.ok(levels!.hostUsedBytes <= levels!.hostBytes)
}

test('what went through memory of the host to a real disk comes back changed', async (t) => {
  const [columns, frames] = [60, 8]
  const cuda = new MockCuda({ pageBytes: 4096, totalBytes: 2 * columns * 4096 })
  const device = CudaDevice.open(0, cuda)
  const layout = tokenMajor({ ...KV, maxTokens: 96 })
  const limits = { slots: 2, regions: 2, limitPages: 2 * columns }
  const kv = new CudaKvMemory(device, layout, new InlinePager(device), limits)
  const signal = new Int32Array(new SharedArrayBuffer(4))
  const startPager = (start: PagerStart) => void new PagerHost(start)
  const offload = { bytes: 70 * 4096, path: temporaryDirectory('tier'), startPager }
  const below = (pages: HostPages): DiskTier =>
    diskBelow(pages, layout, { ...offload, signal: signal.buffer as SharedArrayBuffer })
  const tier = new HostTier(device, kv, { frames, below })
  kv.tier = tier
  t.after(() => {
    kv.close()
    device.close()
    cuda.assertClean()
  })
  const end = async (ticket: number): Promise<void> => {
    for (;;) {
      const found = tier.poll().find((ended) => ended.ticket === ticket)
      if (found) return assert.equal(found.error, undefined)
      cuda.advanceSome(() => true)
      await new Promise((resolve) => setTimeout(resolve, 1))
    }
  }
  const content = (c: number) => new Uint8Array(4096).map((_, i) => (c * 31 + i * 7) % 251)
  kv.grow(0, 0, columns)
  for (let c = 0; c < columns; c++) cuda.write(kv.columnAddress(0, c), content(c))
  const places = Uint32Array.from({ length: columns }, (_, i) => (i * 7) % columns)
  await end(tier.save({ region: 0, first: 0, end: columns }, places))
  assert.ok(tier.levels.spilledBytes > 40 * 4096, 'most of it has gone to the disk')
  kv.discard(0, 0, columns)
  kv.grow(1, 0, columns)
  await end(tier.load({ region: 1, first: 0, end: columns }, places))
  for (let c = 0; c < columns; c++) {
    assert.deepEqual(cuda.read(kv.columnAddress(1, c), 4096), content(c), `column ${c}`)
  }
  tier.places.check()
})

test('a column is copied before the step that writes it, or over one that is still read', () => {
  const cuda = new MockCuda({ pageBytes: 4096, totalBytes: 64 * 4096 })
  const device = CudaDevice.open(0, cuda)
  const layout = tokenMajor({ ...KV, maxTokens: 16 })
  const limits = { slots: 2, regions: 2, limitPages: 40 }
  const kv = new CudaKvMemory(device, layout, new InlinePager(device), limits)
  const tier = new HostTier(device, kv, { frames: 8 })
  kv.tier = tier
  const stream = cuda.createStream()
  const step = (value: number): void => {
    kv.beforeStep(stream)
    cuda.fill8(kv.columnAddress(0, 0), value, 8192, stream)
    kv.afterStep(stream)
  }
  const columns = { region: 0, first: 0, end: 2 }
  const end = (ticket: number): void => {
    while (!tier.poll().some((ended) => ended.ticket === ticket));
  }
  kv.grow(0, 0, 2)
  step(7)
  // Nothing of the step has run yet.
  end(tier.save(columns, Uint32Array.of(0, 1)))
  step(9)
  kv.discard(0, 0, 2)
  kv.grow(0, 0, 2)
  // The same pages, at the same place, while the last step is still to write there.
  end(tier.load(columns, Uint32Array.of(0, 1)))
  cuda.synchronizeStream(stream)
  assert.ok(cuda.read(kv.columnAddress(0, 0), 8192).every((byte) => byte === 7))
  // What is to be copied into a column before the next step, is there before the column goes.
  kv.grow(1, 0, 1)
  kv.copy(1, 0, [{ region: 0, from: 0, to: 1 }])
  end(tier.save({ region: 1, first: 0, end: 1 }, Uint32Array.of(2)))
  kv.discard(0, 0, 2)
  kv.grow(0, 0, 1)
  end(tier.load({ region: 0, first: 0, end: 1 }, Uint32Array.of(2)))
  const row = cuda.read(kv.columnAddress(0, 0), layout.tokenStride)
  assert.ok(row.every((byte) => byte === 7))
  cuda.destroyStream(stream)
  kv.close()
  device.close()
  cuda.assertClean()
})
