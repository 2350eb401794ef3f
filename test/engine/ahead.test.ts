// Catches an engine that queues steps ahead and then tells tokens beyond an end, caches what it
// does not know, counts what was dropped, or waits for the host where the backend can choose.

import assert from 'node:assert/strict'
import { mock, test } from 'node:test'
import { type Backend, StepBatch, type TokenChooser } from '../../src/backends/backend.ts'
import { NullBackend } from '../../src/backends/null/backend.ts'
import { StepsAhead } from '../../src/engine/ahead.ts'
import { GREEDY, type SequenceRequest } from '../../src/engine/api.ts'
import { Sampler } from '../../src/engine/sampler.ts'
import { Sequence } from '../../src/engine/sequence.ts'
import { OutputLengths } from '../../src/scheduler/growth.ts'
import { Bench, expectedOutcome, sequenceRequest, VOCAB } from '../support/null-engine.ts'

const KV = { layers: 2, rowBytes: 64, pageBytes: 256 }
const PAGES = 200

function engine(ahead: boolean, prefixPages = 0): Bench {
  const sizes = { vocab: VOCAB, contextLength: 80, maxSequences: 4, stepTokens: 16, kv: KV }
  const backend = new NullBackend({ ...sizes, ahead })
  const options = { maxSequences: 4, kvPages: PAGES, prefixPages, prefixOutput: prefixPages > 0 }
  return new Bench(backend, options)
}

/** A request that ends with a stop token after `count` others. */
function stopping(count: number, change: Partial<SequenceRequest> = {}): SequenceRequest {
  const request = sequenceRequest({ maxTokens: 40, ...change })
  const { tokens } = expectedOutcome(request)
  const stop = tokens.findIndex((token, i) => i >= count && tokens.indexOf(token) === i)
  assert.ok(stop > 0, 'a token that has not come up before')
  return { ...request, stopTokens: [tokens[stop]!] }
}

test('tokens that were queued beyond an end are told, or counted as its length', (t) => {
  const ended = mock.method(OutputLengths.prototype, 'ended')
  t.after(() => ended.mock.restore())
  const bench = engine(true)
  const requests = [stopping(3), stopping(9, { prompt: Int32Array.of(4, 5) })]
  requests.forEach((request, id) => bench.submit(id, request))
  bench.submit(2, sequenceRequest({ prompt: Int32Array.of(9), maxTokens: 30 }))
  for (let i = 0; i < 7; i++) bench.step()
  bench.core.abort(2)
  bench.runAll()
  requests.forEach((request, id) => {
    const { tokens, reason, outputTokens } = bench.outcome(id)
    assert.deepEqual({ tokens, reason, outputTokens }, expectedOutcome(request))
  })
  const counted = ended.mock.calls.map(({ arguments: [tokens] }) => tokens)
  const real = [0, 1, 2].map((id) => bench.outcome(id).outputTokens)
  assert.deepEqual(counted.toSorted(), real.toSorted(), 'lengths are of tokens that were told')
  bench.core.check()
})

test('an answer is cached with tokens that nobody knew', () => {
  const bench = engine(true, PAGES)
  const first = stopping(11)
  bench.submit(0, first)
  bench.runAll()
  const { tokens } = bench.outcome(0)
  const prompt = Int32Array.of(...first.prompt, ...tokens, ...first.stopTokens, 7, 8)
  const second = sequenceRequest({ prompt, maxTokens: 6 })
  bench.submit(1, second)
  bench.runAll()
  const { cachedTokens, tokens: answer } = bench.outcome(1)
  assert.ok(cachedTokens > first.prompt.length, 'the answer is found')
  assert.deepEqual(answer, expectedOutcome(second).tokens)
  bench.core.check()
})

test('log-probabilities, penalties and biases are chosen by the host, or are others', () => {
  const sampled = { ...GREEDY, temperature: 1.1, topP: 0.9, repetitionPenalty: 1.2, seed: 5 }
  const requests = [
    sequenceRequest({ topLogprobs: 3 }),
    sequenceRequest({ topLogprobs: 0, sampling: sampled }),
    stopping(4, { topLogprobs: 20, sampling: { ...GREEDY, logitBias: [[6, 2]] } }),
  ]
  const outcomes = [false, true].map((ahead) => {
    const onHost = mock.method(Sampler.prototype, 'logprobs')
    const bench = engine(ahead)
    requests.forEach((request, id) => bench.submit(id, request))
    const collect = mock.method(bench.backend, 'collect')
    bench.runAll()
    onHost.mock.restore()
    assert.equal(collect.mock.callCount() > 0, !ahead, 'logits of steps ahead stay where they are')
    return requests.map((_, id) => bench.outcome(id))
  })
  assert.deepEqual(outcomes[1], outcomes[0])
  const { logprobs, tokens, score } = outcomes[1]![2]!
  assert.ok(logprobs.every((one) => one?.top.length === 20))
  assert.ok(score !== undefined && score < 0 && tokens.length > 3)
})

test('a sequence that comes back to a slot draws as it did when it left', () => {
  const begun: number[] = []
  const chooser: TokenChooser = {
    takes: ({ seed }) => seed !== 9,
    begin: (slot) => void begun.push(slot),
    launchChoosing: () => begun.length,
    tokensOf: () => Int32Array.of(1),
    logprobsOf: () => ({ logprob: 0, top: [] }),
  }
  const backend = { collect: () => [] } as unknown as Backend
  const ahead = new StepsAhead(backend, chooser)
  const batch = new StepBatch(16, 4)
  const step = (sequence: Sequence, slot: number) => {
    Object.assign(sequence, { slot, computed: sequence.length - 1 })
    ahead.launch([{ sequence, count: 1 }], batch, 0)
  }
  const one = new Sequence(1, sequenceRequest(), [], 0)
  const hosted = sequenceRequest({ sampling: { ...GREEDY, seed: 9 } })
  step(one, 0)
  step(one, 0)
  assert.deepEqual(begun, [0], 'it stays where it is')
  step(one, 2)
  step(one, 0)
  assert.deepEqual(begun, [0, 2, 0], 'what slot 0 remembers is from before')
  step(new Sequence(2, hosted, [], 0), 0)
  step(one, 0)
  assert.deepEqual(begun, [0, 2, 0, 0], 'a token was chosen there for nobody')
})
