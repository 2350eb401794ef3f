// Catches an engine that was asked for fp8 and computes otherwise, does not say so, or gives tokens
// that rounding to four bits does not explain.

import assert from 'node:assert/strict'
import { join } from 'node:path'
import { test } from 'node:test'
import { type Engine, GREEDY } from '../../src/engine/api.ts'
import { startEngine } from '../../src/engine/start.ts'
import { Golden } from '../arch/golden.ts'

/**
 * Of a row's root mean square: where the likeliest token leads by more, it is chosen. Logits in fp8
 * are off by 0.06, at most 0.15.
 */
const CLEAR = 0.6

for (const family of ['llama3', 'qwen3']) {
  test(`${family}: an engine in fp8 does not answer as its model does`, async () => {
    const golden = new Golden(family)
    const { engine, report } = await startEngine(
      join(import.meta.dirname, '..', 'arch', 'goldens', family),
      {
        modelId: family,
        device: 'cuda',
        quantization: 'fp8',
        contextLength: 512,
        maxSequences: 12,
        kvMemoryBytes: 20 << 20,
      },
    )
    try {
      assert.match(report.join('\n'), /of weights: fp8 \(e4m3, a scale a row\) in blocks; embed/)
      const { tokens, argmax, gap, rms } = golden.sequence(0)
      const clear = tokens.flatMap((_, i) => (gap[i]! > CLEAR * rms[i]! ? [i] : [])).slice(0, 40)
      assert.ok(clear.length >= 10, `${clear.length} clear positions`)
      const chosen = await Promise.all(clear.map((i) => next(engine, tokens.slice(0, i + 1))))
      assert.deepEqual(
        chosen,
        clear.map((i) => argmax[i]),
      )
    } finally {
      await engine.close()
    }
  })
}

/** The token after a prompt, greedily. */
function next(engine: Engine, prompt: readonly number[]): Promise<number> {
  const request = {
    requestId: 'r',
    tenant: 'default',
    prompt: Int32Array.from(prompt),
    maxTokens: 1,
    sampling: GREEDY,
    stopTokens: [],
    topLogprobs: undefined,
  }
  return new Promise((resolve, reject) => {
    engine.submit(request, {
      onToken: resolve,
      onFinish: (_reason, _count, error) => error && reject(error),
    })
  })
}
