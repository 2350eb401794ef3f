// Catches an engine that goes on without its pager, or leaves a request without an end, whether it
// computes or sleeps when the pager is killed. Engine and pager are real, the model is tiny.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { Worker } from 'node:worker_threads'
import { EngineClient } from '../../src/engine/client.ts'
import type { LatticeError } from '../../src/errors.ts'
import { allowedCpus } from '../../src/ffi/libc.ts'
import type { PagerHost } from '../../src/tier/pager-host.ts'
import { sequenceRequest } from '../support/null-engine.ts'
import { TINY_LLAMA, tinyLlama, writeTinyGguf } from '../support/tiny-gguf.ts'

const path = writeTinyGguf(tinyLlama())
const { contextLength, vocab } = TINY_LLAMA
const SEQUENCES = 8

function start(): Promise<EngineClient> {
  return EngineClient.start(
    {
      backend: { kind: 'cpu', modelPath: path, cpus: allowedCpus().slice(0, 1) },
      contextLength,
      // One after the other: none of the last has begun when the first token is there.
      maxSequences: 1,
      stepTokens: 128,
      kvBytes: 1 << 20,
      kvOffload: { bytes: 1 << 20 },
    },
    { id: 'tiny', architecture: 'llama', contextLength, vocabSize: vocab },
    { sequences: SEQUENCES, contextLength },
  )
}

const insides = (engine: EngineClient) => engine as unknown as { pager: PagerHost; worker: Worker }

function exited({ worker }: { worker: Worker }): Promise<unknown> {
  return new Promise((resolve) => worker.once('exit', resolve))
}

test('requests are left without an end, or get tokens from lost memory', async () => {
  const engine = await start()
  const { pager } = insides(engine)
  const exit = exited(insides(engine))
  let killed: Promise<void> | undefined
  const ends = Array.from({ length: SEQUENCES }, () => {
    return new Promise<LatticeError | undefined>((resolve) => {
      engine.submit(sequenceRequest({ prompt: new Int32Array(8), maxTokens: contextLength - 8 }), {
        onToken: () => void (killed ??= pager.terminate()),
        onFinish: (_reason, _count, error) => resolve(error),
      })
    })
  })
  const errors = await Promise.all(ends)
  assert.equal(errors.at(-1)?.code, 'pager_failed')
  assert.throws(() => engine.submit(sequenceRequest({}), { onToken() {}, onFinish() {} }), {
    code: 'engine_stopped',
    message: /moves KV to disk has died/,
  })
  await exit
  await engine.close()
})

test('an engine that sleeps does not notice, and its thread stays', async () => {
  const engine = await start()
  const exit = exited(insides(engine))
  await insides(engine).pager.terminate()
  assert.throws(() => engine.submit(sequenceRequest({}), { onToken() {}, onFinish() {} }), {
    code: 'engine_stopped',
  })
  await exit
  await engine.close()
})
