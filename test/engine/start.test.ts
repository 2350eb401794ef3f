// Catches an engine that starts with limits other than it says, or that promises a context which
// its memory cannot hold.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { type EngineOptions, startEngine } from '../../src/engine/start.ts'
import { LatticeError } from '../../src/errors.ts'
import { sequenceRequest } from '../support/null-engine.ts'
import { TINY_LLAMA, tinyLlama, writeTinyGguf } from '../support/tiny-gguf.ts'

const path = writeTinyGguf(tinyLlama())
const { contextLength } = TINY_LLAMA
/** Rows of 128 bytes, two layers: 256 tokens are 16 pages of 4 KiB. */
const HALF = 16 * 4096

const start = (options: Partial<EngineOptions>) =>
  startEngine(path, { modelId: 'tiny', device: 'cpu', threads: 1, maxSequences: 2, ...options })

test('a context that the memory cannot hold is promised', async () => {
  const { engine, report } = await start({ kvMemoryBytes: HALF })
  try {
    assert.equal(engine.model.contextLength, contextLength / 2)
    assert.ok(report.some((line) => /256 tokens, what the KV memory holds of .* 512/.test(line)))
    const submit = (length: number) => {
      const { promise, resolve, reject } = Promise.withResolvers<string>()
      engine.submit(sequenceRequest({ prompt: new Int32Array(length), maxTokens: 2 }), {
        onToken() {},
        onFinish: (reason, _count, error) => (error ? reject(error) : resolve(reason)),
      })
      return promise
    }
    assert.throws(() => submit(255), { code: 'context_length_exceeded', message: /255.*256/ })
    assert.equal(await submit(254), 'length')
  } finally {
    await engine.close()
  }
})

test('memory for the whole context shortens it, or says that it does', async () => {
  const { engine, report } = await start({ kvMemoryBytes: 2 * HALF })
  await engine.close()
  assert.equal(engine.model.contextLength, contextLength)
  assert.match(report[0]!, /context 512 tokens$/)
  const chosen = await start({ kvMemoryBytes: 2 * HALF, contextLength: 100 })
  await chosen.engine.close()
  assert.equal(chosen.engine.model.contextLength, 100)
  assert.match(chosen.report[0]!, /context 100 tokens$/)
})

test('options that contradict the model, the memory or each other are bent', async () => {
  const kvOffload = { bytes: 1 << 20 }
  const refused: [Partial<EngineOptions>, RegExp][] = [
    [{ contextLength: 257, kvMemoryBytes: HALF }, /context of 257 .* hold 256 tokens/],
    [{ contextLength: 513 }, /context of 513 .* trained for 512/],
    [{ kvMemoryBytes: 4096 }, /4096 bytes .* hold 0 tokens/],
    [{ kvMemoryBytes: 2 ** 50 }, /1048576.0 GiB of KV memory .* this process may have .* in all/],
    [{ maxSequences: 64, stepTokens: 32 }, /step of 32 tokens .* 64 sequences/],
    [{ threads: 1000 }, /1000 threads/],
    [{ prefixCacheBytes: 4096 }, /4096 bytes holds no prompt: .* 64 tokens/],
    [{ prefixEviction: 'lru' }, /--prefix-eviction is about cached prompts/],
    [{ prefixCacheOutput: true }, /--prefix-cache-output is about cached prompts/],
    [{ kvWatermarks: { high: 1, low: 0 } }, /--kv-watermark says when .* it cannot/],
    [{ kvHostBytes: 1 << 20 }, /--kv-host is for a GPU/],
    [{ kvOffload, kvWatermarks: { high: 1, low: 0 } }, /--kv-watermark is about cached prompts/],
    [{ kvOffload, kvStore: { directory: '/', key: '/' } }, /--kv-store is about cached prompts/],
  ]
  for (const [options, message] of refused) {
    const error = await start(options).then(
      async ({ engine }) => void (await engine.close()),
      (thrown: unknown) => thrown,
    )
    assert.ok(error instanceof LatticeError, `${JSON.stringify(options)} was taken`)
    assert.equal(error.code, 'usage')
    assert.match(error.message, message)
    assert.ok(error.todo)
  }
})
