// Catches an engine that dies, loses something or says something else when another process has the
// GPU memory into which a sequence or a cached prefix is just being brought back.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import type { HostTier } from '../../src/backends/cuda/host-tier.ts'
import type { HostPages } from '../../src/backends/cuda/host-pages.ts'
import type { SequenceRequest } from '../../src/engine/api.ts'
import { HashingBackend, mockGpu } from '../support/hashing-backend.ts'
import { MemoryDisk } from '../support/memory-disk.ts'
import { MockCuda } from '../support/mock-cuda.ts'
import { Bench, expectedOutcome, sequenceRequest, VOCAB } from '../support/null-engine.ts'
import { Random } from '../support/random.ts'
import { countUndone, endUnlimited, moveSome, type Undone } from '../support/reloads.ts'
import { loads, runLoad } from '../support/sharing-load.ts'

/** 1.6 tokens a page: 80 tokens need 50 pages. A page of the host has 4 KiB at least. */
const KV = { layers: 2, rowBytes: 1280, pageBytes: 4096 }
/** What the engine leaves to the driver. */
const LEFT_FREE_BYTES = 64 << 20

const tiers = fc.record({
  frames: fc.integer({ min: 20, max: 160 }),
  below: fc.constantFrom(0, 60),
  pollsMax: fc.constantFrom(1, 4, 20),
  watermarks: fc.constantFrom({ high: 0.9, low: 0.8 }, { high: 0.2, low: 0.1 }),
  /** Of 100 calls for pages, so many are refused. */
  refused: fc.constantFrom(3, 15, 60),
  seed: fc.nat(),
})

for (const shareColumns of [1, 8]) {
  for (const chooses of [false, true]) {
    const how = `in groups of ${shareColumns}, ${chooses ? 'steps ahead' : 'step by step'}`
    test(`memory refused to what comes back stops the engine or changes tokens, ${how}`, (t) => {
      const seen = { hits: 0, preemptions: 0, saved: 0 }
      const undone: Undone = { sequences: 0, prefixes: 0 }
      let refusals = 0
      fc.assert(
        fc.property(loads, tiers, fc.boolean(), (load, tier, latePager) => {
          const random = new Random(tier.seed)
          const kvPages = load.kvPages + 2 * shareColumns
          const kv = { ...KV, shareColumns }
          const { maxSequences } = load
          const sizes = { vocab: VOCAB, contextLength: 80, maxSequences, kvPages, kv, chooses }
          const stepTokens = maxSequences + load.extraBudget
          const totalBytes = (kvPages + shareColumns + 1) * kv.pageBytes + LEFT_FREE_BYTES
          const cuda = new MockCuda({ pageBytes: kv.pageBytes, totalBytes })
          let contended = false
          cuda.refuses = () => {
            const refused = contended && random.below(100) < tier.refused
            if (refused) refusals++
            return refused
          }
          const polls = () => 1 + random.below(tier.pollsMax)
          const below = (pages: HostPages) => new MemoryDisk(pages, tier.below, polls, () => false)
          const options = { frames: tier.frames, ...(tier.below > 0 && { below }) }
          const gpu = new HashingBackend(mockGpu(cuda, latePager), {
            ...{ ...sizes, stepTokens, tier: options },
          })
          const { watermarks } = tier
          const moved = { greedy: true, watermarks, comeBack: 'moved' } as const
          const engine = new Bench(gpu, { ...load, kvPages, ...moved })
          countUndone(engine, undone)
          contended = true
          runLoad(engine, { ...load, kvPages }, seen, () => {
            gpu.kv.check()
            ;(gpu.kv.tier as HostTier).places.check()
            cuda.advanceSome(() => random.below(3) > 0)
            engine.nowMs += 30
            moveSome(engine, random)
          })
          contended = false
          assert.equal(engine.core.snapshot().tier?.lost, 0, 'what was outside is there still')
          endUnlimited(engine, gpu, kvPages)
          cuda.assertClean()
        }),
        { seed: 23, numRuns: 60, endOnFailure: true },
      )
      t.diagnostic(JSON.stringify({ ...seen, ...undone, refusals }))
      assert.ok(undone.sequences > 20 && undone.prefixes > 20, JSON.stringify(undone))
    })
  }
}

/** A small engine whose clock moves on, and what becomes of what it is asked. */
function small(refuses: (call: number) => boolean) {
  const kv = { ...KV, shareColumns: 2 }
  const kvPages = 40
  const totalBytes = (kvPages + 4) * kv.pageBytes + LEFT_FREE_BYTES
  const cuda = new MockCuda({ pageBytes: kv.pageBytes, totalBytes })
  const sizes = { vocab: VOCAB, contextLength: 60, maxSequences: 2, stepTokens: 8, kvPages, kv }
  const tier = { frames: 100 }
  const gpu = new HashingBackend(mockGpu(cuda), { ...sizes, chooses: true, tier })
  const options = { maxSequences: 2, kvPages, prefixPages: 20, greedy: true } as const
  const engine = new Bench(gpu, { ...options, comeBack: 'moved' })
  cuda.refuses = refuses
  const ask = (id: number, first: number, length: number): void => {
    const prompt = Int32Array.from({ length }, (_, i) => (first + i) % VOCAB)
    const request = sequenceRequest({ prompt, maxTokens: 30 })
    engine.submit(id, request)
    requests.push(request)
  }
  const requests: SequenceRequest[] = []
  const { core } = engine
  return {
    ...{ cuda, core, engine, ask },
    step(): void {
      engine.step()
      core.check()
      gpu.kv.check()
      ;(gpu.kv.tier as HostTier).places.check()
      engine.nowMs += 20
    },
    /** Moves the only session there is until it is where it should be, or time is over. */
    move(kind: 'reload' | 'offload', ms: number): boolean {
      for (const end = engine.nowMs + ms; engine.nowMs < end; engine.nowMs += 5) {
        const [session] = core.answer({ kind: 'sessions', tenant: 'default' })
        assert.ok(session, 'what is cached stays cached')
        const told = core.answer({ kind, tenant: 'default', id: session.id })
        const there = kind === 'reload' ? session.where === 'memory' : session.pages === 0
        assert.equal(there, told === 'done', 'a session is said to be where it is')
        if (told === 'done') return true
        core.settle()
        core.check()
      }
      return false
    },
    end(): void {
      requests.forEach((request, id) => {
        const { tokens, reason, outputTokens } = engine.outcome(id)
        assert.deepEqual({ tokens, reason, outputTokens }, expectedOutcome(request))
      })
      assert.equal(core.snapshot().tier?.lost, 0)
      engine.settle()
      gpu.close()
      cuda.assertClean()
    },
  }
}

/** A prefix goes and comes by hand, then one of two sequences makes room for the other. */
function goAndCome(refuses: (call: number) => boolean): { calls: number; undone: Undone } {
  const { engine, core, cuda, ask, step, move, end } = small(refuses)
  const undone: Undone = { sequences: 0, prefixes: 0 }
  countUndone(engine, undone)
  ask(0, 3, 20)
  while (!core.idle) step()
  assert.ok(move('offload', 1000), 'it goes')
  engine.settle()
  assert.ok(move('reload', 5000), 'it comes back in the end')
  ask(1, 3, 25)
  ask(2, 30, 21)
  while (!core.idle) step()
  end()
  return { calls: cuda.calls.get('createPages') ?? 0, undone }
}

test('a call for pages whose refusal loses or stops something', (t) => {
  const { calls } = goAndCome(() => false)
  const undone: Undone = { sequences: 0, prefixes: 0 }
  for (const run of [1, 3, 20]) {
    for (let from = 0; from < calls; from++) {
      const seen = goAndCome((call) => call >= from && call < from + run)
      undone.sequences += seen.undone.sequences
      undone.prefixes += seen.undone.prefixes
    }
  }
  t.diagnostic(`${calls} calls; undone: ${JSON.stringify(undone)}`)
  assert.ok(undone.sequences > 10 && undone.prefixes > 10, JSON.stringify(undone))
})
