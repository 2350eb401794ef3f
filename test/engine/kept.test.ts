// Holds the engine to one promise on the real model: a prompt whose beginning went to disk, or was
// there when the engine started, is answered to the last bit as one that was computed.

import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import type { Engine } from '../../src/engine/api.ts'
import { type EngineOptions, startEngine } from '../../src/engine/start.ts'
import { defaultModelPath, WITHOUT_MODEL } from '../support/default-model.ts'
import { sequenceRequest } from '../support/null-engine.ts'
import { temporaryDirectory } from '../support/temporary.ts'

const path = defaultModelPath()
const skip = path === undefined ? WITHOUT_MODEL : false

interface Answer {
  tokens: number[]
  logprobs: number[]
  cached: number
}

/** 200 tokens that prompts have in common, then 70 of their own. */
function prompt(stream: number): Int32Array {
  return Int32Array.from(
    { length: 270 },
    (_, t) => 300 + ((t * 7919 + (t < 200 ? 0 : stream * 104_729)) % 29_000),
  )
}

function ask(engine: Engine, stream: number): Promise<Answer> {
  const { promise, resolve, reject } = Promise.withResolvers<Answer>()
  const answer: Answer = { tokens: [], logprobs: [], cached: 0 }
  engine.submit(sequenceRequest({ prompt: prompt(stream), maxTokens: 6, topLogprobs: 0 }), {
    onStart: (cached) => void (answer.cached = cached),
    onToken: (token, logprobs) => {
      answer.tokens.push(token)
      answer.logprobs.push(logprobs!.logprob)
    },
    onFinish: (_reason, _count, error) => (error ? reject(error) : resolve(answer)),
  })
  return promise
}

/** Runs an engine that is closed whatever happens. */
async function engineOf<T>(
  options: Partial<EngineOptions>,
  act: (engine: Engine) => Promise<T>,
): Promise<T> {
  // One thread: two that wait for each other stand still when another test has their core.
  const base = { modelId: 'm', device: 'cpu', threads: 1, maxSequences: 2 } as const
  const { engine } = await startEngine(path!, { ...base, contextLength: 512, ...options })
  try {
    return await act(engine)
  } finally {
    await engine.close()
  }
}

/** Until no transfer moves anything any more. */
async function settled(engine: Engine): Promise<void> {
  for (let before = -1; ;) {
    const { tier } = await engine.snapshot()
    const now = tier!.savedBytes
    if (now > 0 && now === before) return
    before = now
    await new Promise((resolve) => setTimeout(resolve, 200))
  }
}

test(
  'a prefix that was on disk changes an answer by a bit, or is computed again',
  { skip },
  async () => {
    const expected = await engineOf({}, async (engine) => [
      await ask(engine, 1),
      await ask(engine, 2),
    ])
    const directory = temporaryDirectory('kept')
    const key = join(temporaryDirectory('key'), 'key')
    writeFileSync(key, randomBytes(32), { mode: 0o600 })
    const options: Partial<EngineOptions> = {
      prefixCacheBytes: 64 << 20,
      kvOffload: { bytes: 256 << 20 },
      kvStore: { directory, key },
      // Whatever is only cached goes at once.
      kvWatermarks: { high: 0, low: 0 },
    }
    const first = await engineOf(options, async (engine) => {
      const answers = [await ask(engine, 1)]
      await settled(engine)
      answers.push(await ask(engine, 2))
      await settled(engine)
      const { tier } = await engine.snapshot()
      assert.ok(tier!.demotions > 0 && tier!.fetches > 0, JSON.stringify(tier))
      return answers
    })
    const second = await engineOf(options, async (engine) => [
      await ask(engine, 1),
      await ask(engine, 2),
    ])
    assert.deepEqual(
      [...first, ...second].map(({ cached }) => cached),
      [0, 200, 206, 206],
    )
    for (const answers of [first, second]) {
      answers.forEach(({ tokens, logprobs }, i) => {
        assert.deepEqual(tokens, expected[i]!.tokens)
        assert.deepEqual(logprobs, expected[i]!.logprobs)
      })
    }
  },
)
