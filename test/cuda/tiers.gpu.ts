// Catches KV that does not come back to a real GPU as it went: through memory of the host, through
// a disk, under a sequence in the middle of its answer, under many that push each other out, or
// beside somebody who takes the memory that it comes back to.

import assert from 'node:assert/strict'
import { join } from 'node:path'
import { test } from 'node:test'
import fc from 'fast-check'
import type { HostPages } from '../../src/backends/cuda/host-pages.ts'
import type { HostTier } from '../../src/backends/cuda/host-tier.ts'
import type { CudaKvMemory } from '../../src/backends/cuda/kv-memory.ts'
import { openCuda } from '../../src/backends/cuda/open.ts'
import { type Engine, GREEDY } from '../../src/engine/api.ts'
import { startEngine } from '../../src/engine/start.ts'
import { dummyModel } from '../../src/model/dummy.ts'
import { NativeCuda } from '../../src/ffi/cuda-native.ts'
import { Golden } from '../arch/golden.ts'
import { HashingBackend } from '../support/hashing-backend.ts'
import { MemoryDisk } from '../support/memory-disk.ts'
import { Bench, sequenceRequest, VOCAB } from '../support/null-engine.ts'
import { countUndone, moveSome, type Undone } from '../support/reloads.ts'
import { loads, runLoad } from '../support/sharing-load.ts'
import { Random } from './gpu.ts'
import { realGpu } from './real-gpu.ts'

let driver: NativeCuda | undefined
let skip: string | false = false
try {
  driver = new NativeCuda()
} catch (thrown) {
  skip = `there is no GPU: ${String(thrown)}`
}

/** 1.6 tokens a page; only the ends of each token's row are written and checked. */
const KV = { layers: 2, rowBytes: 655_360, pageBytes: 2 << 20 }

test('a column goes astray on a real GPU', { skip }, (t) => {
  const seen = { hits: 0, preemptions: 0, saved: 0 }
  const did = { offloads: 0, demotions: 0, fetches: 0, spilled: 0, fetched: 0 }
  fc.assert(
    fc.property(loads, fc.integer({ min: 8, max: 90 }), fc.boolean(), (load, frames, disk) => {
      const kv = { ...KV, shareColumns: 8 }
      const kvPages = load.kvPages + 16
      const stepTokens = load.maxSequences + load.extraBudget
      const { maxSequences } = load
      const sizes = { vocab: VOCAB, contextLength: 80, maxSequences, stepTokens, kvPages, kv }
      let made: MemoryDisk | undefined
      const below = (pages: HostPages) =>
        (made = new MemoryDisk(
          pages,
          60,
          () => 3,
          () => false,
        ))
      const tier = { frames, ...(disk && { below }) }
      const gpu = new HashingBackend(realGpu(driver!), { ...sizes, tier })
      const watermarks = { high: 0.2, low: 0.1 }
      try {
        const moved = { greedy: true, watermarks, comeBack: 'moved' } as const
        const engine = new Bench(gpu, { ...load, kvPages, ...moved })
        runLoad(engine, { ...load, kvPages }, seen, () => {
          gpu.kv.check()
          ;(gpu.kv.tier as HostTier).places.check()
        })
        const after = engine.core.snapshot().tier!
        for (const name of ['offloads', 'demotions', 'fetches'] as const) did[name] += after[name]
        did.spilled += made?.moved.save ?? 0
        did.fetched += made?.moved.load ?? 0
      } finally {
        gpu.close()
      }
    }),
    { seed: 23, numRuns: 8, endOnFailure: true },
  )
  t.diagnostic(JSON.stringify({ ...seen, ...did }))
  assert.ok(did.demotions > 3 && did.spilled > 3, JSON.stringify(did))
})

/** Somebody who has, in an instant, all memory of the GPU that is free. */
class Hog {
  private readonly driver: NativeCuda
  private taken: number[] = []

  constructor(driver: NativeCuda) {
    this.driver = driver
  }

  take(): void {
    for (const bytes of [1 << 30, 64 << 20, 2 << 20]) {
      while (this.driver.memoryInfo().freeBytes >= bytes) {
        try {
          this.taken.push(this.driver.allocate(bytes))
        } catch (thrown) {
          // What is free is not always to be had.
          assert.match(String(thrown), /OUT_OF_MEMORY/)
          break
        }
      }
    }
  }

  giveBack(): void {
    for (const address of this.taken.splice(0)) this.driver.free(address)
  }
}

test('memory refused to what comes back to a real GPU changes tokens', { skip }, (t) => {
  const seen = { hits: 0, preemptions: 0, saved: 0 }
  const undone: Undone = { sequences: 0, prefixes: 0 }
  fc.assert(
    fc.property(loads, fc.nat(), fc.constantFrom(1, 8), (load, seed, shareColumns) => {
      const random = new Random(seed)
      const kvPages = load.kvPages + 2 * shareColumns
      const kv = { ...KV, shareColumns }
      const stepTokens = load.maxSequences + load.extraBudget
      const { maxSequences } = load
      const sizes = { vocab: VOCAB, contextLength: 80, maxSequences, stepTokens, kvPages, kv }
      const gpu = new HashingBackend(realGpu(driver!), { ...sizes, tier: { frames: 160 } })
      const hog = new Hog(driver!)
      try {
        const watermarks = { high: 0.2, low: 0.1 }
        const moved = { greedy: true, watermarks, comeBack: 'moved' } as const
        const engine = new Bench(gpu, { ...load, kvPages, ...moved })
        countUndone(engine, undone)
        runLoad(engine, { ...load, kvPages }, seen, () => {
          gpu.kv.check()
          ;(gpu.kv.tier as HostTier).places.check()
          engine.nowMs += 30
          // Idle memory goes back at once: whoever comes back asks for it again.
          gpu.kv.settle(engine.nowMs)
          const now = random.below(6)
          if (now === 0) hog.take()
          if (now === 1) hog.giveBack()
          if (random.below(8) === 0) moveSome(engine, random)
        })
        assert.equal(engine.core.snapshot().tier?.lost, 0, 'what was outside is there still')
        hog.giveBack()
        for (const _ of [1, 2]) {
          engine.nowMs += 1000
          gpu.kv.drain()
          engine.step()
        }
        assert.equal(engine.core.snapshot().kv.limitPages, kvPages, 'the limit is what it was')
      } finally {
        hog.giveBack()
        gpu.close()
      }
    }),
    { seed: 23, numRuns: 12, endOnFailure: true },
  )
  t.diagnostic(JSON.stringify({ ...seen, ...undone }))
  assert.ok(undone.sequences + undone.prefixes > 3, JSON.stringify(undone))
})

/** 100 prompts of a model's own sequences, of 1 to 300 tokens. */
function prompts(golden: Golden, seed: number): Int32Array[] {
  const random = new Random(seed)
  return Array.from({ length: 100 }, (_, i) => {
    const { tokens } = golden.sequence(i % 2)
    const length = 1 + random.below(300)
    const from = random.below(tokens.length)
    return Int32Array.from({ length }, (_, at) => tokens[(from + at) % tokens.length]!)
  })
}

test('a sequence goes on otherwise after its KV was in memory of the host', { skip }, (t) => {
  const golden = new Golden('llama3')
  const size = { contextLength: 512, maxSequences: 1, stepTokens: 512, kvBytes: 64 << 20 }
  const gpu = openCuda(golden.model, { device: 0, ...size, kvHostBytes: 64 << 20 })
  try {
    const kv = gpu.backend.kv as CudaKvMemory
    const tier = kv.tier!
    const { pageBytes } = kv.layout.shape
    const bench = new Bench(gpu.backend, { maxSequences: 1, kvPages: 32 })
    const stream = gpu.device.driver.createStream()
    const finish = (ticket: number): void => {
      while (!tier.poll().some((ended) => ended.ticket === ticket));
    }
    /** Out, poison in its place, and back. */
    const disturb = (tokens: number): void => {
      const end = Math.ceil((tokens * kv.layout.tokenStride) / pageBytes)
      const columns = { region: kv.regionOf(0), first: 0, end }
      const places = Uint32Array.from({ length: end }, (_, i) => i)
      finish(tier.save(columns, places))
      const { driver } = gpu.device
      driver.fill8(kv.columnAddress(columns.region, 0), 0xff, end * pageBytes, stream)
      driver.synchronizeStream(stream)
      finish(tier.load(columns, places))
      for (const place of places) tier.forget?.(place)
    }
    const random = new Random(9)
    let id = 0
    for (const prompt of prompts(golden, 3)) {
      const request = sequenceRequest({ prompt, maxTokens: 40 })
      bench.submit(id, request)
      bench.runAll()
      const undisturbed = bench.outcome(id++).tokens
      bench.submit(id, request)
      const at = new Set([1 + random.below(38), 1 + random.below(38)])
      for (let step = 0; !bench.core.idle; step++) {
        bench.step()
        const [sequence] = bench.core.snapshot().sequences
        if (at.has(step) && sequence) disturb(prompt.length + 40)
      }
      assert.deepEqual(bench.outcome(id++).tokens, undisturbed)
    }
    gpu.device.driver.destroyStream(stream)
    t.diagnostic(`${id / 2} sequences of 40 tokens, each away twice, all the same`)
  } finally {
    gpu.close()
  }
})

/** A page holds 64 tokens of it. */
const MODEL = 'dummy:llama-3.2-1b'

test('sequences that push each other out of a GPU say something else', { skip }, (t) => {
  const model = dummyModel(MODEL)
  const size = { contextLength: 640, maxSequences: 12, stepTokens: 512 }
  const gpu = openCuda(model, { device: 0, ...size, kvBytes: 256 << 20, kvHostBytes: 256 << 20 })
  const random = new Random(7)
  const asked = Array.from({ length: 100 }, () =>
    sequenceRequest({
      prompt: Int32Array.from({ length: 1 + random.below(300) }, () => random.below(100_000)),
      maxTokens: 40 + random.below(200),
    }),
  )
  const run = (kvPages: number, topLogprobs: number | undefined): Bench => {
    const moved = { greedy: true, comeBack: 'moved' } as const
    const bench = new Bench(gpu.backend, { maxSequences: 12, kvPages, ...moved })
    asked.forEach((request, id) => bench.submit(id, { ...request, topLogprobs }))
    bench.runAll()
    bench.core.check()
    bench.settle(1e9)
    return bench
  }
  try {
    const pushed = run(36, undefined)
    const alone = run(128, 5)
    const { tier, preemptions } = pushed.core.snapshot()
    let same = 0
    let worst = 0
    asked.forEach((_, id) => {
      const got = pushed.outcome(id).tokens
      const { tokens, logprobs } = alone.outcome(id)
      assert.equal(got.length, tokens.length)
      const at = got.findIndex((token, i) => token !== tokens[i])
      if (at < 0) return void same++
      // Other batches round otherwise (decision 12): where they part, either token is right.
      const { logprob, top } = logprobs[at]!
      const other = top.find(({ token }) => token === got[at])
      worst = Math.max(worst, logprob - (other?.logprob ?? -Infinity))
    })
    t.diagnostic(JSON.stringify({ same, worst, preemptions, ...tier }))
    assert.ok(tier && tier.offloads >= 20, `${tier?.offloads} made room`)
    assert.ok(worst < 0.15, `a token is less likely than another by ${worst}`)
  } finally {
    gpu.close()
  }
})

test('the flags bring KV to a disk and back from it', { skip }, async (t) => {
  const folder = join(import.meta.dirname, '..', 'arch', 'goldens', 'llama3')
  const { engine, report } = await startEngine(folder, {
    ...{ modelId: 'llama3', device: 'cuda', contextLength: 512, maxSequences: 1 },
    kvMemoryBytes: 16 << 20,
    prefixCacheBytes: 12 << 20,
    kvHostBytes: 16 << 20,
    kvOffload: { bytes: 400 << 20 },
  })
  try {
    for (const line of report) t.diagnostic(line)
    // Each of another tenant, so that each is cached by itself; the second answer begins there.
    const asked = prompts(new Golden('llama3'), 4)
    const ask = (i: number) => answer(engine, asked[i]!, `tenant ${i}`)
    const warm: number[][] = []
    for (const i of asked.keys()) {
      await ask(i)
      warm.push(await ask(i))
    }
    let outside = 0
    for (const i of asked.keys()) {
      const tenant = `tenant ${i}`
      const [session] = await engine.ask({ kind: 'sessions', tenant })
      if (session && session.where !== 'memory') outside++
      const id = session?.id ?? ''
      for (let tries = 0; session; tries++) {
        const told = await engine.ask({ kind: 'reload', tenant, id })
        if (told === 'done') break
        assert.ok(told === 'moving' && tries < 10_000, told)
        await new Promise((resolve) => setTimeout(resolve, 1))
      }
      assert.deepEqual(await ask(i), warm[i], `prompt ${i}`)
    }
    const { tier } = await engine.snapshot()
    t.diagnostic(`${outside} of ${asked.length} came from outside: ${JSON.stringify(tier)}`)
    assert.ok(tier && tier.lost === 0 && outside > 80)
    assert.ok(tier.levels && tier.levels.spilledBytes > 0, 'some of it has gone to the disk')
  } finally {
    await engine.close()
  }
})

function answer(engine: Engine, prompt: Int32Array, tenant: string): Promise<number[]> {
  const request = sequenceRequest({ prompt, tenant, maxTokens: 20, sampling: GREEDY })
  return new Promise((resolve, reject) => {
    const output: number[] = []
    engine.submit(request, {
      onToken: (token) => output.push(token),
      onFinish: (_reason, _count, error) => (error ? reject(error) : resolve(output)),
    })
  })
}
