// Catches a choice among samples that takes the wrong ones, tells of them too early, or leaves some
// running.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { ByteTokenizer, EOS, FakeEngine } from '../../test/support/fake-engine-generation.ts'
import { LatticeError } from '../errors.ts'
import { GREEDY } from './api.ts'
import { generateBest } from './best-of.ts'
import type { GenerationEvent } from './generation.ts'

const tokenizer = new ByteTokenizer()
const REQUEST = {
  requestId: 'r',
  tenant: 'default',
  prompt: Int32Array.of(1),
  choices: 2,
  sampling: GREEDY,
  maxTokens: 1e9,
  stop: [] as string[],
  ignoreEos: false,
  topLogprobs: undefined,
}

/** The scripted engine's tokens are as unlikely as their byte is large. */
function engineOf(...texts: string[]): FakeEngine {
  return new FakeEngine((i) => [...tokenizer.encode(texts[i]!), EOS])
}

async function collect(
  engine: FakeEngine,
  change: Partial<typeof REQUEST>,
  bestOf: number,
  between = () => engine.step(),
) {
  const generation = generateBest(engine, tokenizer, { ...REQUEST, ...change }, bestOf)
  const ticking = setInterval(between, 0)
  const events: GenerationEvent[] = []
  try {
    for await (const event of generation.events) {
      assert.equal(engine.running, 0, 'a sample is told before all have ended')
      events.push(event)
    }
  } finally {
    clearInterval(ticking)
  }
  return { events, discarded: generation.discardedTokens }
}

test('samples that a stop string ended are ranked by more than was received', async () => {
  // Means of what is received: b's, c's, a's. After the stop string more would come.
  const engine = engineOf('bbSzzzz', 'ccSzz', 'aaSz', 'zzz')
  const { events, discarded } = await collect(engine, { stop: ['S'] }, 4)
  assert.deepEqual(
    events.map((event) => [event.choice, event.kind, event.kind === 'delta' && event.text]),
    [
      [0, 'delta', 'aa'],
      [0, 'finish', false],
      [1, 'delta', 'bb'],
      [1, 'finish', false],
    ],
  )
  assert.equal(discarded, 3 + 4)
  for (const event of events) {
    if (event.kind === 'delta') assert.ok(event.tokens.every((token) => !token.logprobs))
  }
})

test('an error of one sample is hidden behind better ones, or the others run on', async () => {
  const engine = engineOf('a', 'b', 'c')
  const error = new LatticeError('backend_failed', 'It failed.')
  const { events } = await collect(engine, { choices: 1 }, 3, () => {
    const [first] = engine.sequences
    if (first && !first.ended) engine.finish(first, 'error', error)
    engine.step()
  })
  assert.equal(events.length, 1)
  assert.ok(events[0]!.kind === 'finish' && events[0]!.error === error)
})
