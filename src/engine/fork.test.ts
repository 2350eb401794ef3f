// Catches forks of running sequences that go on as their parent did not, are told less, or cost
// what their parent has computed.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Bench, expectedOutcome, sequenceRequest, VOCAB } from '../../test/support/null-engine.ts'
import { Random } from '../../test/support/random.ts'
import { NullBackend, nullLogits } from '../backends/null/backend.ts'
import { extendHash } from '../backends/null/kv-memory.ts'
import { GREEDY, type SamplingParams, type SequenceRequest } from './api.ts'
import { Sampler, SamplerState } from './sampler.ts'

/** 3.2 tokens a page, so that rows lie across pages; two layers. */
const KV = { layers: 2, rowBytes: 80, pageBytes: 256 }

function bench(maxSequences: number, kvPages = 10_000, stepTokens = 80, ahead = false): Bench {
  const sizes = { vocab: VOCAB, contextLength: 80, maxSequences, stepTokens, kv: KV }
  return new Bench(new NullBackend({ ...sizes, ahead }), { maxSequences, kvPages })
}

/** What follows `before`, drawn with numbers that begin where those of `before` end. */
function expectedFork(request: SequenceRequest, before: number[], sampling: SamplingParams) {
  const sampler = new Sampler(VOCAB)
  const state = new SamplerState(sampling, request.prompt)
  const logits = new Float32Array(VOCAB)
  let hash = request.prompt.reduce(extendHash, 0)
  const tokens: number[] = []
  while (tokens.length < request.maxTokens) {
    nullLogits(hash, logits)
    const drawn = sampler.sample(logits, state)
    const token = before[tokens.length] ?? drawn
    state.accept(token)
    hash = extendHash(hash, token)
    tokens.push(token)
  }
  return tokens
}

test('a fork goes on from other tokens, or its parent does after it', () => {
  let [forks, preemptions] = [0, 0]
  for (let seed = 1; seed <= 150; seed++) {
    const random = new Random(seed)
    const engine = bench(2 + random.below(6), 50 + random.below(60), 40, seed % 2 === 0)
    const samplings = [0, 1, 2].map((i) => ({ ...GREEDY, temperature: i % 2, seed: i }))
    const request = sequenceRequest({
      prompt: Int32Array.from({ length: 1 + random.below(20) }, () => random.below(VOCAB)),
      maxTokens: 10 + random.below(40),
    })
    const expected = new Map<number, number[]>()
    const inherited = new Map([0, 1, 2].map((id) => [id, 0]))
    const choices = samplings.slice(0, 1 + random.below(3))
    const first = [...choices.keys()]
    engine.submitChoices(first, request, choices)
    choices.forEach((sampling, id) => {
      expected.set(id, expectedOutcome({ ...request, sampling }).tokens)
    })
    for (let step = 0; !engine.core.idle; step++) {
      assert.ok(step < 5000, `seed ${seed}: it does not end`)
      const parent = random.pick([...expected.keys()])
      if (
        expected.size < 9 &&
        random.below(3) === 0 &&
        engine.outcome(parent).reason === undefined
      ) {
        const sampling = random.pick(samplings)
        const id = expected.size
        engine.fork(parent, id, sampling)
        if (engine.outcome(id).error) {
          // Its parent's last token had been queued ahead.
          assert.equal(engine.outcome(id).error!.code, 'not_found')
          assert.notEqual(engine.outcome(parent).reason, undefined)
          engine.outcomes.delete(id)
          continue
        }
        const before = known(engine, parent, inherited.get(parent)!, expected.get(parent)!)
        inherited.set(id, before.length)
        expected.set(id, expectedFork(request, before, sampling))
        forks++
      }
      engine.step()
      engine.core.check()
    }
    for (const [id, tokens] of expected) {
      assert.deepEqual(engine.outcome(id).tokens, tokens, `seed ${seed}: fork ${id}`)
      assert.equal(engine.outcome(id).outputTokens, tokens.length)
      assert.equal(engine.outcome(id).started, 1)
    }
    engine.settle()
    assert.equal(engine.core.snapshot().kv.residentBytes, 0)
    preemptions += engine.core.snapshot().preemptions
  }
  assert.ok(forks > 500 && preemptions > 100, `${forks} ${preemptions}`)
})

/** The parent's tokens so far: told to its sink, or to be told when it leaves the queue. */
function known(engine: Bench, parent: number, inherited: number, all: number[]): number[] {
  const { tokens, started } = engine.outcome(parent)
  return started > 0 ? tokens.slice() : all.slice(0, inherited)
}

test('64 forks compute what their parent had, or take memory before they write', () => {
  const engine = bench(65)
  const request = sequenceRequest({ prompt: new Int32Array(40).fill(3), maxTokens: 30 })
  engine.submit(0, request)
  for (let i = 0; i < 10; i++) engine.step()
  const before = engine.core.snapshot()
  for (let id = 1; id <= 64; id++) engine.fork(0, id, GREEDY)
  const after = engine.core.snapshot()
  assert.equal(after.running, 65)
  assert.equal(after.kv.usedPages, before.kv.usedPages)
  engine.runAll()
  assert.equal(engine.core.snapshot().promptTokens, 40)
  const { tokens } = expectedOutcome(request)
  for (let id = 0; id <= 64; id++) assert.deepEqual(engine.outcome(id).tokens, tokens)
})

test('a fork of what has ended, or of a beam, waits for ever', () => {
  const engine = bench(8)
  engine.submit(0, sequenceRequest({ maxTokens: 1 }))
  engine.runAll()
  engine.fork(0, 1, GREEDY)
  assert.equal(engine.outcome(1).error?.code, 'not_found')
  const beams = { width: 2, lengthPenalty: 1, earlyStopping: false }
  engine.submitChoices([2], sequenceRequest({ beams }), [])
  engine.step()
  engine.fork(2, 3, GREEDY)
  assert.equal(engine.outcome(3).error?.code, 'invalid_request')
  engine.runAll()
  assert.equal(engine.outcome(2).reason, 'length')
})
