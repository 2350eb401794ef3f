// Catches a real driver that does not do with its virtual memory what the mock does: the same loads
// as on the mock, with real pages, through the pager's thread.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { NativeCuda } from '../../src/ffi/cuda-native.ts'
import { beamArrivals, columnsNeeded, runBeamLoad } from '../support/beam-load.ts'
import { HashingBackend } from '../support/hashing-backend.ts'
import { Bench, VOCAB } from '../support/null-engine.ts'
import { loads, runLoad } from '../support/sharing-load.ts'
import { realGpu } from './real-gpu.ts'

/** 1.6 tokens a page, as on the mock; only the ends of each token's row are written and checked. */
const KV = { layers: 2, rowBytes: 655_360, pageBytes: 2 << 20 }

let driver: NativeCuda | undefined
let skip: string | false = false
try {
  driver = new NativeCuda()
} catch (thrown) {
  skip = `there is no GPU: ${String(thrown)}`
}

for (const shareColumns of [1, 8]) {
  test(`a token, a page or a mapping goes astray in groups of ${shareColumns}`, { skip }, () => {
    const cuda = driver!
    const seen = { hits: 0, preemptions: 0, saved: 0 }
    let splits = 0
    const freeBefore: number[] = []
    fc.assert(
      fc.property(loads, (load) => {
        const kvPages = load.kvPages + 2 * shareColumns
        const kv = { ...KV, shareColumns }
        const stepTokens = load.maxSequences + load.extraBudget
        const { maxSequences } = load
        const sizes = { vocab: VOCAB, contextLength: 80, maxSequences, stepTokens, kvPages, kv }
        const gpu = new HashingBackend(realGpu(cuda), sizes)
        try {
          const engine = new Bench(gpu, { ...load, kvPages, greedy: true })
          freeBefore.push(cuda.memoryInfo().freeBytes)
          runLoad(engine, { ...load, kvPages }, seen, ({ residentBytes, pageBytes }) => {
            gpu.kv.check()
            assert.ok(residentBytes <= kvPages * pageBytes, 'memory keeps to its limit')
          })
          splits += gpu.kv.counters.splits
        } finally {
          gpu.close()
        }
      }),
      { seed: 17, numRuns: 8, endOnFailure: true },
    )
    const lost = (freeBefore[1] ?? 0) - (freeBefore.at(-1) ?? 0)
    assert.ok(lost < 64 << 20, `${lost} B are lost to the driver`)
    console.log(JSON.stringify({ shareColumns, ...seen, splits }))
  })
}

test('beams find something else on real pages, or stop the engine', { skip }, () => {
  const seen = { searches: 0, preemptions: 0, compactions: 0 }
  const kv = { ...KV, shareColumns: 2 }
  const sizesOf = { bytes: KV.layers * KV.rowBytes, pageBytes: KV.pageBytes, group: 2 }
  fc.assert(
    fc.property(beamArrivals, (arrivals) => {
      const kvPages = columnsNeeded(arrivals, sizesOf)
      const [maxSequences, stepTokens] = [6, 20]
      const sizes = { vocab: VOCAB, contextLength: 80, maxSequences, stepTokens, kvPages, kv }
      const gpu = new HashingBackend(realGpu(driver!), sizes)
      try {
        const engine = new Bench(gpu, { maxSequences, kvPages, greedy: true })
        runBeamLoad(engine, arrivals, seen, () => gpu.kv.check())
      } finally {
        gpu.close()
      }
    }),
    { seed: 17, numRuns: 8, endOnFailure: true },
  )
  console.log(JSON.stringify(seen))
  assert.ok(seen.searches > 10, JSON.stringify(seen))
})
