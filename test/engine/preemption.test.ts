// Holds the engine to one promise on the real model: a sequence that had to make room, by being
// computed again or by going to disk, goes on to the last bit as if it had never been disturbed.

import assert from 'node:assert/strict'
import { test, type TestContext } from 'node:test'
import { CHUNK_TOKENS_MIN, CpuBackend } from '../../src/backends/cpu/backend.ts'
import { GREEDY, type SequenceRequest } from '../../src/engine/api.ts'
import type { CoreOptions } from '../../src/engine/core-contract.ts'
import { allowedCpus } from '../../src/ffi/libc.ts'
import { pagesFor } from '../../src/kv/layout.ts'
import { openModel } from '../../src/model/load.ts'
import { stepTokensNeeded } from '../../src/scheduler/scheduler.ts'
import { PagerHost } from '../../src/tier/pager-host.ts'
import { defaultModelPath, WITHOUT_MODEL } from '../support/default-model.ts'
import { Bench, type Outcome, sequenceRequest } from '../support/null-engine.ts'

const path = defaultModelPath()
const skip = path === undefined ? WITHOUT_MODEL : false
const UNLIMITED = 1e9

/** Answers to the requests, and how sequences made room, in tokens of memory. */
function run(
  t: TestContext,
  requests: readonly SequenceRequest[],
  options: Omit<CoreOptions, 'kvPages'> & { kvTokens: number },
  offloadBytes = 0,
): { outcomes: Outcome[]; preemptions: number; offloads: number } {
  const { maxSequences, kvTokens } = options
  const signal = new SharedArrayBuffer(4)
  let host: PagerHost | undefined
  const startPager = (start: ConstructorParameters<typeof PagerHost>[0]) => {
    host = new PagerHost(start)
  }
  const backend = new CpuBackend(openModel(path!), {
    contextLength: 512,
    maxSequences,
    stepTokens: stepTokensNeeded(maxSequences, CHUNK_TOKENS_MIN),
    // One thread: two that wait for each other stand still when another test has their core.
    cpus: allowedCpus().slice(0, 1),
    pin: false,
    ...(offloadBytes > 0 && { offload: { bytes: offloadBytes, signal, startPager } }),
  })
  t.after(() => host?.terminate())
  try {
    const kvPages = pagesFor(backend.kv.layout, kvTokens)
    const engine = new Bench(backend, { ...options, kvPages })
    requests.forEach((request, id) => engine.submit(id, request))
    while (!engine.core.idle) {
      if (!engine.step()) Atomics.wait(new Int32Array(signal), 0, 0, 1)
      engine.core.check()
    }
    const { preemptions, tier } = engine.core.snapshot()
    assert.equal(tier?.lost ?? 0, 0)
    return { outcomes: [...engine.outcomes.values()], preemptions, offloads: tier?.offloads ?? 0 }
  } finally {
    backend.close()
  }
}

function requestsOf(lengths: readonly number[], maxTokens: number): SequenceRequest[] {
  return lengths.map((length, i) => {
    const prompt = Int32Array.from({ length }, (_, t) => 300 + ((t * 7919 + i * 104_729) % 29_000))
    const sampling = i % 2 === 0 ? GREEDY : { ...GREEDY, temperature: 0.9, seed: i }
    return sequenceRequest({ prompt, sampling, maxTokens, topLogprobs: 1 })
  })
}

test('a sequence that is computed again differs in a bit from before', { skip }, (t) => {
  // Prompts below and above a chunk.
  const requests = requestsOf([30, 66, 20], 44)
  const undisturbed = run(t, requests, { maxSequences: 4, kvTokens: UNLIMITED })
  assert.equal(undisturbed.preemptions, 0)
  for (const prefixPages of [0, 500]) {
    const options = { maxSequences: 4, kvTokens: 140, prefixPages, greedy: true }
    const disturbed = run(t, requests, options)
    assert.ok(disturbed.preemptions >= 1, `${disturbed.preemptions} preemptions`)
    assert.deepEqual(disturbed.outcomes.map(whatCounts), undisturbed.outcomes.map(whatCounts))
  }
})

test('one of 100 sequences differs in a bit because some were on disk', { skip }, (t) => {
  const requests = requestsOf(
    Array.from({ length: 100 }, (_, i) => 5 + (i % 4)),
    9,
  )
  const undisturbed = run(t, requests, { maxSequences: 16, kvTokens: UNLIMITED })
  const options = { maxSequences: 16, kvTokens: 64, greedy: true, comeBack: 'moved' } as const
  const disturbed = run(t, requests, options, 64 << 20)
  assert.ok(disturbed.offloads >= 30, `${disturbed.offloads} offloads`)
  assert.equal(disturbed.offloads, disturbed.preemptions)
  assert.deepEqual(disturbed.outcomes.map(whatCounts), undisturbed.outcomes.map(whatCounts))
})

test(
  'beams that were on disk together find something else than beams that were not',
  { skip },
  (t) => {
    const requests = requestsOf([40, 30, 20], 40)
    const beams = { width: 3, lengthPenalty: 1, earlyStopping: false } as const
    const search = sequenceRequest({ ...requests[0]!, maxTokens: 30, beams })
    // Early ones grow until the beams, which came last, have to go.
    const all = [...requests.slice(1), search]
    const undisturbed = run(t, all, { maxSequences: 5, kvTokens: UNLIMITED })
    const options = { maxSequences: 5, kvTokens: 190, greedy: true, comeBack: 'moved' } as const
    const disturbed = run(t, all, options, 64 << 20)
    assert.ok(disturbed.offloads >= 3, `${disturbed.offloads} offloads`)
    assert.deepEqual(disturbed.outcomes.map(whatCounts), undisturbed.outcomes.map(whatCounts))
  },
)

function whatCounts({ tokens, logprobs, reason, score }: Outcome): Partial<Outcome> {
  return { tokens, logprobs, reason, score }
}
