// Holds the engine to one promise on the real model: sequences that went to disk and came back are
// answered, to the last bit, as if they had stayed.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { type Engine, GREEDY, type TokenLogprobs } from '../../src/engine/api.ts'
import { startEngine } from '../../src/engine/start.ts'
import { defaultModelPath, WITHOUT_MODEL } from '../support/default-model.ts'
import { sequenceRequest } from '../support/null-engine.ts'

const path = defaultModelPath()
const skip = path === undefined ? WITHOUT_MODEL : false
const SEQUENCES = 100

interface Answer {
  tokens: number[]
  logprobs: (TokenLogprobs | undefined)[]
}

function answers(engine: Engine): Promise<Answer[]> {
  return Promise.all(
    Array.from({ length: SEQUENCES }, (_, i) => {
      const prompt = Int32Array.from({ length: 6 + (i % 7) }, (_, t) => 300 + t * 7919 + i * 104)
      const answer: Answer = { tokens: [], logprobs: [] }
      const { promise, resolve, reject } = Promise.withResolvers<Answer>()
      const sampling = i % 4 < 3 ? GREEDY : { ...GREEDY, temperature: 0.9, seed: i }
      const maxTokens = 12 + (i % 5)
      engine.submit(sequenceRequest({ prompt, sampling, maxTokens, topLogprobs: 0 }), {
        onToken: (token, logprobs) => {
          answer.tokens.push(token)
          answer.logprobs.push(logprobs)
        },
        onFinish: (_reason, _count, error) => (error ? reject(error) : resolve(answer)),
      })
      return promise
    }),
  )
}

const options = { modelId: 'm', device: 'cpu', threads: 1, maxSequences: 16 } as const

async function run(change: object): Promise<{ all: Answer[]; offloads: number }> {
  const { engine } = await startEngine(path!, { ...options, contextLength: 64, ...change })
  try {
    const all = await answers(engine)
    const { tier } = await engine.snapshot()
    return { all, offloads: tier?.offloads ?? 0 }
  } finally {
    await engine.close()
  }
}

test('a sequence that was on disk is answered otherwise', { skip }, async () => {
  const undisturbed = await run({})
  const disturbed = await run({
    // Room for five of sixteen at their full length.
    kvMemoryBytes: 4 << 20,
    kvOffload: { bytes: 64 << 20 },
  })
  assert.deepEqual(disturbed.all, undisturbed.all)
  assert.ok(disturbed.offloads > 50, `${disturbed.offloads} offloads`)
})
