// Catches an engine on a GPU that answers otherwise than the model: many sequences at once, in
// steps that are queued ahead, with shared prompts and aborts.

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

const FAMILIES = ['llama3', 'qwen3', 'qwen3-yarn']

test('greedy answers are not those of transformers', { skip }, async (t) => {
  const asked = []
  for (const family of FAMILIES) {
    const folder = join(import.meta.dirname, '..', 'arch', 'goldens', family)
    asked.push({ folder, answers: await answersOf(family, folder, (line) => t.diagnostic(line)) })
  }
  const python = spawnSync('python3', [join(import.meta.dirname, 'greedy.py')], {
    input: JSON.stringify(asked),
    encoding: 'utf8',
  })
  assert.equal(python.status, 0, python.stderr)
  const judged = JSON.parse(python.stdout.trim().split('\n').at(-1)!) as Judged[]
  judged.forEach(({ worst, chosen, exact }, i) => {
    const said = `${FAMILIES[i]}: ${chosen} tokens, ${exact} the same, worst ${worst}`
    t.diagnostic(said)
    assert.ok(worst <= TOLERANCE && exact >= EXACT * chosen, said)
  })
})

interface Judged {
  worst: number
  chosen: number
  exact: number
}

async function answersOf(family: string, folder: string, say: (line: string) => void) {
  const golden = new Golden(family)
  const { engine, report } = await startEngine(folder, {
    modelId: family,
    device: 'cuda',
    contextLength: 512,
    maxSequences: 12,
    kvMemoryBytes: 20 << 20,
    prefixCacheBytes: 6 << 20,
  })
  try {
    report.forEach(say)
    const random = new Random(5)
    const wanted = Array.from({ length: 60 }, (_, i): Wanted => {
      const { tokens } = golden.sequence(i % 2)
      const prompt = Int32Array.from(tokens.slice(0, 1 + random.below(tokens.length - 1)))
      return { prompt, maxTokens: 1 + random.below(60), abort: i % 9 === 8 }
    })
    const outputs = await Promise.all(wanted.map((one) => run(engine, one)))
    const { prefixHits } = await engine.snapshot()
    assert.ok(prefixHits > 0, 'prompts are shared')
    return outputs.flatMap((output, i) => {
      const { prompt, maxTokens, abort } = wanted[i]!
      if (!abort) assert.equal(output.length, maxTokens)
      return output.length > 0 ? [{ tokens: [...prompt, ...output], prompt: prompt.length }] : []
    })
  } finally {
    await engine.close()
  }
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
