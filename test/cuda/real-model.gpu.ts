// Catches a real, quantised model that says other things on a GPU than on a CPU, or other things
// when it is asked for log-probabilities.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { type Engine, GREEDY, type TokenLogprobs } from '../../src/engine/api.ts'
import { startEngine } from '../../src/engine/start.ts'
import { openModel } from '../../src/model/load.ts'
import { loadTokenizer } from '../../src/text/load.ts'
import { defaultModelPath, WITHOUT_MODEL } from '../support/default-model.ts'

const TEXTS = [
  'The river was wide and slow, and on its far bank the town began: a church, a mill, and a row of',
  'To make bread, mix the flour with water, salt and yeast. Let it rest for an hour, then fold it',
  'A computer program is a list of steps. When the machine runs it, each step reads some numbers,',
  'The first law says that energy is not made or lost. It only moves from one form to another: the',
]
const TOP = 20
/** Nats, mean: the CPU rounds inputs to 8 bits in blocks (2e-3), the GPU to bfloat16 (1e-3). */
const DIVERGENCE = 6e-3
/** Of the likeliest tokens, those that must be the same. */
const SAME = 0.85
const GREEDY_TOKENS = 48

const path = defaultModelPath()
const skip = path === undefined && WITHOUT_MODEL

interface Answer {
  tokens: number[]
  logprobs: (TokenLogprobs | undefined)[]
}

test('the default model says other things on a GPU', { skip }, async (t) => {
  const tokenizer = loadTokenizer(openModel(path!))
  const prompts = TEXTS.map((text) =>
    tokenizer.encode(text, { addSpecial: true, parseSpecial: false }),
  )
  const prefixes = prompts.flatMap((prompt) =>
    Array.from({ length: prompt.length - 2 }, (_, i) => prompt.slice(0, i + 3)),
  )
  const [onCpu, onGpu] = [await run('cpu', prefixes, prompts), await run('cuda', prefixes, prompts)]
  let [sum, same] = [0, 0]
  onCpu.next.forEach(({ logprobs: [wanted] }, i) => {
    const got = onGpu.next[i]!.logprobs[0]!
    sum += divergence(wanted!, got)
    if (wanted!.top[0]!.token === got.top[0]!.token) same++
  })
  const mean = sum / prefixes.length
  const said = `${prefixes.length} distributions: ${mean.toExponential(1)} nats apart, ${same} same`
  t.diagnostic(said)
  assert.ok(mean <= DIVERGENCE && same >= SAME * prefixes.length, said)
  assert.deepEqual(
    onGpu.plain.map(({ tokens }) => tokens),
    onGpu.logged.map(({ tokens }) => tokens),
    'log-probabilities change what is said',
  )
  onGpu.logged.forEach(({ tokens, logprobs }) => {
    tokens.forEach((token, i) => assert.equal(logprobs[i]!.top[0]!.token, token))
  })
})

async function run(device: 'cpu' | 'cuda', prefixes: Int32Array[], prompts: Int32Array[]) {
  const { engine } = await startEngine(path!, {
    modelId: 'model',
    device,
    contextLength: 512,
    kvMemoryBytes: 1 << 30,
    maxQueue: 1000,
  })
  try {
    const all = (list: Int32Array[], maxTokens: number, top?: number) =>
      Promise.all(list.map((prompt) => ask(engine, prompt, maxTokens, top)))
    return {
      next: await all(prefixes, 1, TOP),
      plain: await all(prompts, GREEDY_TOKENS),
      logged: await all(prompts, GREEDY_TOKENS, 1),
    }
  } finally {
    await engine.close()
  }
}

function ask(engine: Engine, prompt: Int32Array, maxTokens: number, top?: number): Promise<Answer> {
  const answer: Answer = { tokens: [], logprobs: [] }
  const request = { requestId: 'r', tenant: 't', prompt, sampling: GREEDY, maxTokens }
  return new Promise((resolve, reject) => {
    engine.submit(
      { ...request, stopTokens: [], topLogprobs: top },
      {
        onToken(token, logprobs) {
          answer.tokens.push(token)
          answer.logprobs.push(logprobs)
        },
        onFinish: (_reason, _count, error) => (error ? reject(error) : resolve(answer)),
      },
    )
  })
}

/** KL(p ‖ q) over p's likeliest tokens and all others as one; those that q lacks are its last's. */
function divergence(p: TokenLogprobs, q: TokenLogprobs): number {
  const known = new Map(q.top.map(({ token, logprob }) => [token, logprob]))
  const least = q.top.at(-1)!.logprob
  let [sum, ofP, ofQ] = [0, 0, 0]
  for (const { token, logprob } of p.top) {
    const other = known.get(token) ?? least
    sum += Math.exp(logprob) * (logprob - other)
    ofP += Math.exp(logprob)
    ofQ += Math.exp(other)
  }
  const [restP, restQ] = [Math.max(1e-9, 1 - ofP), Math.max(1e-9, 1 - ofQ)]
  return sum + restP * Math.log(restP / restQ)
}
