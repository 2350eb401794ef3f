// Holds the engine to one promise on the real model: a sequence that had to make room goes on, to
// the last bit, as if it had never been disturbed.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { CHUNK_TOKENS_MIN, CpuBackend } from '../../src/backends/cpu/backend.ts'
import { GREEDY, type SequenceRequest } from '../../src/engine/api.ts'
import { allowedCpus } from '../../src/ffi/libc.ts'
import { openModel } from '../../src/model/load.ts'
import { pagesFor } from '../../src/kv/layout.ts'
import { stepTokensNeeded } from '../../src/scheduler/scheduler.ts'
import { defaultModelPath, WITHOUT_MODEL } from '../support/default-model.ts'
import { Bench, sequenceRequest } from '../support/null-engine.ts'

const path = defaultModelPath()
const skip = path === undefined ? WITHOUT_MODEL : false
const SEQUENCES = 4
const CONTEXT = 512

/** Prompts below and above a chunk; every other one is sampled. */
const requests = [30, 66, 20, 100, 40, 64].map((length, i): SequenceRequest => {
  const prompt = Int32Array.from({ length }, (_, t) => 300 + ((t * 7919 + i * 104_729) % 29_000))
  const sampling = i % 2 === 0 ? GREEDY : { ...GREEDY, temperature: 0.9, seed: i }
  return sequenceRequest({ prompt, sampling, maxTokens: 56, topLogprobs: 2 })
})

function run(backend: CpuBackend, kvPages: number, prefixPages: number) {
  const engine = new Bench(backend, {
    maxSequences: SEQUENCES,
    kvPages,
    prefixPages,
    greedy: true,
  })
  requests.forEach((request, id) => engine.submit(id, request))
  while (engine.step()) engine.core.check()
  engine.settle()
  return { outcomes: engine.outcomes, preemptions: engine.core.snapshot().preemptions }
}

test('a sequence that is computed again differs in a bit from before', { skip }, () => {
  const options = {
    contextLength: CONTEXT,
    maxSequences: SEQUENCES,
    stepTokens: stepTokensNeeded(SEQUENCES, CHUNK_TOKENS_MIN),
    cpus: allowedCpus().slice(0, 1),
    pin: false,
  }
  const model = openModel(path!)
  const open = () => new CpuBackend(model, options)
  const backends = [open(), open(), open()]
  try {
    const undisturbed = run(backends[0]!, 1e9, 0)
    assert.equal(undisturbed.preemptions, 0)
    const kvPages = pagesFor(backends[1]!.kv.layout, 180)
    for (const [i, prefixPages] of [0, kvPages >> 1].entries()) {
      const disturbed = run(backends[i + 1]!, kvPages, prefixPages)
      assert.ok(disturbed.preemptions >= 3, `${disturbed.preemptions} preemptions`)
      for (const [id, outcome] of undisturbed.outcomes) {
        const { tokens, logprobs } = disturbed.outcomes.get(id)!
        assert.deepEqual(tokens, outcome.tokens)
        assert.deepEqual(logprobs, outcome.logprobs)
      }
    }
  } finally {
    for (const backend of backends) backend.close()
  }
})
