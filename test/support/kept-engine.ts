// Owns an engine with a store, and the process around it that a test kills: it checks what it
// finds, says when all is durable, and goes on computing.
//
//   node kept-engine.ts MODEL STORE KEY ANSWERS

import assert from 'node:assert/strict'
import { writeSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Engine } from '../../src/engine/api.ts'
import { type StartedEngine, startEngine } from '../../src/engine/start.ts'
import { sequenceRequest } from './null-engine.ts'

/** Three that begin alike, for a vocabulary of 320. */
export const PROMPTS = [0, 1, 2].map((i) =>
  Int32Array.from({ length: 300 + 20 * i }, (_, t) => (t < 200 ? t % 300 : (t * 7 + i * 31) % 300)),
)

export interface Answer {
  tokens: number[]
  cached: number
}

export function startKept(path: string, directory: string, key: string): Promise<StartedEngine> {
  return startEngine(path, {
    modelId: 'tiny',
    device: 'cpu',
    threads: 1,
    maxSequences: 2,
    kvMemoryBytes: 4 << 20,
    prefixCacheBytes: 2 << 20,
    kvOffload: { bytes: 4 << 20 },
    kvStore: { directory, key },
  })
}

export function ask(engine: Engine, prompt: Int32Array): Promise<Answer> {
  const answer: Answer = { tokens: [], cached: 0 }
  return new Promise((resolve, reject) => {
    engine.submit(sequenceRequest({ prompt, maxTokens: 8 }), {
      onStart: (cached) => (answer.cached = cached),
      onToken: (token) => answer.tokens.push(token),
      onFinish: (_reason, _count, error) => (error ? reject(error) : resolve(answer)),
    })
  })
}

async function live(path: string, directory: string, key: string, answers: number[][]) {
  const { engine } = await startKept(path, directory, key)
  const kept = async () => (await engine.snapshot()).tier?.kept ?? 0
  writeSync(1, `found ${await kept()}\n`)
  for (const [i, prompt] of PROMPTS.entries()) {
    assert.deepEqual((await ask(engine, prompt)).tokens, answers[i])
  }
  while ((await kept()) < PROMPTS.length) await sleep(5)
  writeSync(1, 'kept\n')
  for (let i = 0; ; i++) {
    await ask(
      engine,
      Int32Array.from({ length: 200 }, (_, t) => (t + i) % 300),
    )
  }
}

if (import.meta.main) {
  const [path = '', directory = '', key = '', answers = ''] = process.argv.slice(2)
  await live(path, directory, key, JSON.parse(answers) as number[][])
}
