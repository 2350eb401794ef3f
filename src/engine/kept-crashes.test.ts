// Catches prefixes that come back from an earlier life as others, after any number of crashes at
// any step, and records whose places are used for something else.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Bench, expectedOutcome, sequenceRequest, VOCAB } from '../../test/support/null-engine.ts'
import { NullDisk, NullStoreTier } from '../../test/support/null-store.ts'
import { Random } from '../../test/support/random.ts'
import { NullBackend } from '../backends/null/backend.ts'
import { LatticeError } from '../errors.ts'

/** 3.2 tokens a page, so that rows lie across pages; two layers. */
const KV = { layers: 2, rowBytes: 80, pageBytes: 256 }
const CONTEXT = 80
const WORDS = [[1, 2, 3, 4, 5], [1, 2, 9], [6], [7, 8, 7, 8, 7, 8, 7]]
const RUNS = 150

test('an earlier life gives other prompts back, or a crash loses their places', (t) => {
  const seed = 1 + Math.floor(Math.random() * 1e9)
  t.diagnostic(`seed ${seed}`)
  const seen = { crashes: 0, entries: 0, hits: 0, fetches: 0 }
  for (let run = 0; run < RUNS; run++) {
    const random = new Random(seed + run)
    const capacity = [20, 60, 300][random.below(3)]!
    const disk = new NullDisk(capacity)
    for (let life = 0; life < 4; life++) live(random, capacity, disk, seen, seed + run)
  }
  t.diagnostic(JSON.stringify(seen))
  assert.ok(seen.entries > 100 && seen.hits > 100 && seen.fetches > 50)
})

type Seen = Record<'crashes' | 'entries' | 'hits' | 'fetches', number>

function live(random: Random, capacity: number, disk: NullDisk, seen: Seen, seed: number): void {
  const maxSequences = 1 + random.below(4)
  const stepTokens = maxSequences + random.below(30)
  const sizes = { vocab: VOCAB, contextLength: CONTEXT, maxSequences, stepTokens, kv: KV }
  const backend = new NullBackend(sizes)
  const faults = random.below(3) === 0 ? 10 : 0
  const tier = new NullStoreTier(backend.kv, disk, random, {
    capacity,
    polls: () => 1 + random.below(4),
    fault: () =>
      random.below(100) < faults ? new LatticeError('os_call_failed', 'io') : undefined,
  })
  backend.kv.tier = tier
  seen.entries += disk.records.length
  const engine = new Bench(backend, {
    maxSequences,
    kvPages: 50 + random.below(60),
    prefixPages: [12, 50][random.below(2)]!,
    watermarks: [
      { high: 0.9, low: 0.8 },
      { high: 0.2, low: 0.1 },
    ][random.below(2)]!,
  })
  engine.core.check()
  const requests = Array.from({ length: 3 + random.below(8) }, () => {
    const words = Array.from({ length: 1 + random.below(6) }, () => WORDS[random.below(4)]!)
    return sequenceRequest({
      prompt: Int32Array.from(words.flat()),
      maxTokens: 1 + random.below(20),
    })
  })
  const crashAt = random.below(2) === 0 ? random.below(200) : Infinity
  let next = 0
  for (let step = 0; step < crashAt; step++) {
    if (next < requests.length && random.below(4) === 0) engine.submit(next, requests[next++]!)
    engine.step()
    engine.nowMs += random.below(30)
    if (random.below(3) === 0) engine.core.settle()
    engine.core.check()
    if (next === requests.length && engine.core.idle && !engine.core.flush()) break
    assert.ok(step < 10_000, `seed ${seed}: it does not end`)
  }
  if (crashAt < Infinity) seen.crashes++
  tier.crash()
  seen.fetches += engine.core.snapshot().tier!.fetches
  for (let id = 0; id < next; id++) {
    const { tokens, reason, cachedTokens, error } = engine.outcome(id)
    const expected = expectedOutcome(requests[id]!)
    assert.equal(error, undefined, `seed ${seed}`)
    assert.deepEqual(tokens, expected.tokens.slice(0, tokens.length), `seed ${seed}`)
    if (reason) assert.equal(reason, expected.reason)
    if (cachedTokens > 0) seen.hits++
  }
}
