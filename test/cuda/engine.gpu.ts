// Catches an engine on a GPU that answers otherwise than the model: many sequences at once, in
// steps that are queued ahead, with shared prompts, too little memory, stops and aborts.

import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { join } from 'node:path'
import { test } from 'node:test'
import { type Engine, GREEDY, type SequenceRequest } from '../../src/engine/api.ts'
import { startEngine } from '../../src/engine/start.ts'
import { Golden } from '../arch/golden.ts'
import { Random } from './gpu.ts'

/** bf16 against float32: of two tokens whose logits are as near, either is right. */
const TOLERANCE = 0.12
/** Of all tokens, those that must be the very same. */
const EXACT = 0.97

const noOracle = spawnSync('python3', ['-c', 'import torch, transformers'], { encoding: 'utf8' })
const skip = noOracle.status === 0 ? false : 'python3 has no torch and transformers to compare with'

for (const family of ['llama3', 'qwen3', 'qwen3-yarn']) {
  test(`${family}: greedy answers are not those of transformers`, { skip }, async (t) => {
    const folder = join(import.meta.dirname, '..', 'arch', 'goldens', family)
    const golden = new Golden(family)
    const { engine, report } = await startEngine(folder, {
      modelId: family,
      device: 'cuda',
      contextLength: 512,
      maxSequences: 12,
      // Pages of 2 MiB hold many tokens of so small a model: this is too little for all.
      kvMemoryBytes: 20 << 20,
      prefixCacheBytes: 6 << 20,
    })
    t.after(() => engine.close())
    t.diagnostic(report.join('\n'))
    const random = new Random(5)
    const answers = Array.from({ length: 60 }, (_, i) => {
      const { tokens } = golden.sequence(i % 2)
      const prompt = Int32Array.from(tokens.slice(0, 1 + random.below(tokens.length - 1)))
      return { prompt, maxTokens: 1 + random.below(60), abort: i % 9 === 8 }
    })
    const outputs = await Promise.all(answers.map((answer) => run(engine, answer)))
    const judged = outputs.map((output, i) => {
      const { prompt, maxTokens, abort } = answers[i]!
      if (!abort) assert.equal(output.length, maxTokens)
      return { tokens: [...prompt, ...output], prompt: prompt.length }
    })
    const python = spawnSync('python3', [join(import.meta.dirname, 'greedy.py'), folder], {
      input: JSON.stringify(judged.filter(({ tokens, prompt }) => tokens.length > prompt)),
      encoding: 'utf8',
    })
    assert.equal(python.status, 0, python.stderr)
    const { worst, chosen, exact } = JSON.parse(python.stdout.trim().split('\n').at(-1)!)
    const { preemptions, prefixHits } = await engine.snapshot()
    const said = `${chosen} tokens, ${exact} the same, worst ${worst}`
    t.diagnostic(`${said}, ${preemptions} preemptions, ${prefixHits} prompt tokens shared`)
    assert.ok(worst <= TOLERANCE && exact >= EXACT * chosen, said)
  })
}

interface Wanted {
  prompt: Int32Array
  maxTokens: number
  abort: boolean
}

function run(engine: Engine, { prompt, maxTokens, abort }: Wanted): Promise<number[]> {
  const request: SequenceRequest = {
    requestId: 'r',
    tenant: 'default',
    prompt,
    maxTokens,
    sampling: GREEDY,
    stopTokens: [],
    topLogprobs: undefined,
  }
  return new Promise((resolve, reject) => {
    const output: number[] = []
    const handle = engine.submit(request, {
      onToken(token) {
        output.push(token)
        if (abort && output.length === 3) handle.abort()
      },
      onFinish: (_reason, _count, error) => (error ? reject(error) : resolve(output)),
    })
  })
}
