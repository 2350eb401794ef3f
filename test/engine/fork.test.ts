// Holds forks to one promise on real memory and real attention: whenever a sequence is forked, both
// go on with the tokens and log-probabilities that one alone would have had.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { CpuBackend } from '../../src/backends/cpu/backend.ts'
import { GREEDY } from '../../src/engine/api.ts'
import { openModel } from '../../src/model/load.ts'
import { Bench, sequenceRequest } from '../support/null-engine.ts'

const MODEL = fileURLToPath(new URL('../arch/goldens/beams', import.meta.url))

test('a fork, or its parent after it, goes on as none did', () => {
  const sizes = { contextLength: 128, maxSequences: 40, stepTokens: 200, cpus: [0], pin: false }
  const backend = new CpuBackend(openModel(MODEL), sizes)
  try {
    const engine = new Bench(backend, { maxSequences: 40, kvPages: 1e6 })
    const prompt = Int32Array.from({ length: 20 }, (_, i) => (i * 37) % 190)
    const request = sequenceRequest({ prompt, maxTokens: 60, topLogprobs: 0 })
    engine.submit(0, request)
    engine.runAll()
    const alone = engine.outcome(0)
    engine.submit(1, request)
    // A page holds 16 rows: forks at every place in it, of the parent and of each other.
    for (let id = 2; id < 36; id++) {
      engine.step()
      engine.fork(id % 2 === 0 ? 1 : id - 1, id, GREEDY)
    }
    engine.runAll()
    for (let id = 1; id < 36; id++) {
      const { tokens, logprobs } = engine.outcome(id)
      assert.deepEqual(tokens, alone.tokens, `fork ${id}`)
      logprobs.forEach((found, i) => {
        // Matrices of float32 are multiplied by another kernel when there are several columns.
        const error = Math.abs((found ?? alone.logprobs[i]!).logprob - alone.logprobs[i]!.logprob)
        assert.ok(error < 1e-4, `fork ${id}, token ${i}: ${error}`)
      })
      assert.ok(logprobs.at(-1), 'a fork has no logprobs of its own')
    }
    assert.equal(engine.core.snapshot().promptTokens, 2 * 20)
  } finally {
    backend.close()
  }
})
