// Holds the engine to one promise on the real model: what a request is answered depends on the
// request and its seed, not on who shares its steps.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { type Engine, GREEDY, type SamplingParams } from '../../src/engine/api.ts'
import { startEngine } from '../../src/engine/start.ts'
import { defaultModelPath, WITHOUT_MODEL } from '../support/default-model.ts'

const path = defaultModelPath()
const SAMPLED: SamplingParams = { ...GREEDY, temperature: 0.8, topP: 0.95, seed: 11 }

/** Ordinary token ids that differ by stream. */
function prompt(length: number, stream: number): Int32Array {
  return Int32Array.from({ length }, (_, i) => 300 + ((i * 7919 + stream * 104_729) % 29_000))
}

function generate(engine: Engine, ids: Int32Array, count: number, seed = 11): Promise<number[]> {
  return new Promise((resolve, reject) => {
    const tokens: number[] = []
    const request = {
      requestId: 'test',
      tenant: 'test',
      prompt: ids,
      sampling: { ...SAMPLED, seed },
      maxTokens: count,
      stopTokens: [],
      topLogprobs: undefined,
    }
    engine.submit(request, {
      onToken: (token) => void tokens.push(token),
      onFinish: (_reason, _count, error) => (error ? reject(error) : resolve(tokens)),
    })
  })
}

test(
  'a seeded answer changes with the requests around it',
  { skip: path === undefined ? WITHOUT_MODEL : false },
  async (t) => {
    // One thread: two that wait for each other stand still when another test has their core.
    const options = { modelId: 'm', device: 'cpu', threads: 1, maxSequences: 16 } as const
    const { engine } = await startEngine(path!, options)
    t.after(() => engine.close())
    // Short and long prompts; outputs that cross from grouped to lone attention (256 positions);
    // a long one that is cut into chunks when others are there.
    const cases = [
      { ids: prompt(5, 1), count: 24 },
      { ids: prompt(70, 2), count: 24 },
      { ids: prompt(245, 3), count: 24 },
      { ids: prompt(530, 4), count: 12 },
      { ids: prompt(700, 5), count: 12 },
    ]
    const alone: number[][] = []
    for (const { ids, count } of cases) alone.push(await generate(engine, ids, count))
    const crowd = Array.from({ length: 9 }, (_, i) =>
      generate(engine, prompt(30 + 83 * i, 20 + i), 16, i),
    )
    const together = await Promise.all(cases.map(({ ids, count }) => generate(engine, ids, count)))
    await Promise.all(crowd)
    assert.deepEqual(together, alone)
  },
)
