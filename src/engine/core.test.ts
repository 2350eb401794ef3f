// Catches an engine whose answers depend on who else is being served, that keeps memory of those
// who left, or that lets one sequence's failure reach another.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { Bench, expectedOutcome, sequenceRequest, VOCAB } from '../../test/support/null-engine.ts'
import { NullBackend, type NullBackendOptions } from '../backends/null/backend.ts'
import { LatticeError } from '../errors.ts'
import { GREEDY, type SequenceRequest } from './api.ts'

/** 4 tokens a page and two layers: 2 pages for each 4 tokens. */
const KV = { layers: 2, rowBytes: 64, pageBytes: 256 }
const CONTEXT = 80
const PLENTY = 10_000

function bench(options: Partial<NullBackendOptions> = {}, kvPages = PLENTY): Bench {
  const maxSequences = options.maxSequences ?? 4
  const defaults = { vocab: VOCAB, contextLength: CONTEXT, maxSequences, stepTokens: 16, kv: KV }
  return new Bench(new NullBackend({ ...defaults, ...options }), {
    maxSequences,
    kvPages,
    greedy: true,
  })
}

const requests: fc.Arbitrary<SequenceRequest> = fc
  .record({
    prompt: fc.array(fc.nat(VOCAB - 1), { minLength: 1, maxLength: 20 }),
    maxTokens: fc.oneof(fc.integer({ min: 1, max: 6 }), fc.integer({ min: 30, max: 60 })),
    stopTokens: fc.constantFrom([], [], [], [7, 11]),
    temperature: fc.constantFrom(0, 0.7, 1.5),
    topK: fc.constantFrom(0, 5),
    topP: fc.constantFrom(1, 0.9),
    repetitionPenalty: fc.constantFrom(1, 1.3),
    frequencyPenalty: fc.constantFrom(0, 0.5),
    seed: fc.nat(),
  })
  .map(({ prompt, maxTokens, stopTokens, ...sampling }) =>
    sequenceRequest({
      prompt: Int32Array.from(prompt),
      maxTokens,
      stopTokens,
      sampling: { ...GREEDY, ...sampling },
    }),
  )

const loads = fc.record({
  maxSequences: fc.integer({ min: 2, max: 6 }),
  extraBudget: fc.nat(30),
  ahead: fc.boolean(),
  // One sequence of 80 tokens needs 40 pages.
  kvPages: fc.integer({ min: 40, max: 90 }),
  arrivals: fc.array(
    fc.record({
      request: requests,
      gap: fc.nat(2),
      // A fifth is aborted.
      abortAfter: fc.nat(60).chain((at) => fc.constantFrom(at, ...Array(4).fill(undefined))),
    }),
    { minLength: 4, maxLength: 12 },
  ),
})

test('the batch, the step budget, aborts or preemption around a sequence change its tokens', () => {
  let preemptions = 0
  fc.assert(
    fc.property(loads, ({ maxSequences, extraBudget, kvPages, arrivals, ahead }) => {
      const stepTokens = maxSequences + extraBudget
      const engine = bench({ maxSequences, stepTokens, ahead }, kvPages)
      const events: { at: number; act: () => void }[] = []
      let at = 0
      arrivals.forEach(({ request, gap, abortAfter }, id) => {
        at += gap
        events.push({ at, act: () => engine.submit(id, request) })
        if (abortAfter === undefined) return
        events.push({ at: at + abortAfter, act: () => engine.core.abort(id) })
      })
      for (let step = 0; events.length > 0 || !engine.core.idle; step++) {
        for (const event of events.filter((event) => event.at === step)) {
          events.splice(events.indexOf(event), 1)
          event.act()
        }
        engine.step()
        const { usedPages, pageBytes, residentBytes } = engine.core.snapshot().kv
        assert.ok(usedPages <= kvPages, 'the limit is exceeded')
        assert.ok(residentBytes <= usedPages * pageBytes, 'memory is used that nobody counted')
      }
      engine.settle()
      const { kv, finished, preemptions: preempted } = engine.core.snapshot()
      preemptions += preempted
      assert.equal(kv.usedPages, 0)
      assert.equal(kv.residentBytes, 0)
      assert.equal(finished.stop + finished.length + finished.abort, arrivals.length)
      arrivals.forEach(({ request, abortAfter }, id) => {
        const { tokens, reason, outputTokens, started } = engine.outcome(id)
        const expected = expectedOutcome(request)
        if (reason === 'abort') {
          assert.notEqual(abortAfter, undefined)
          assert.deepEqual(tokens, expected.tokens.slice(0, tokens.length))
          assert.ok(started === 1 || tokens.length === 0)
        } else {
          assert.deepEqual({ tokens, reason, outputTokens }, expected)
          assert.equal(started, 1, 'a sequence leaves the queue once')
        }
      })
    }),
    { seed: 41, numRuns: 500 },
  )
  assert.ok(preemptions > 400, `only ${preemptions} preemptions were seen`)
})

test('an abort at some moment leaves pages behind for more than a step', () => {
  const request = sequenceRequest({ prompt: new Int32Array(30).fill(5), maxTokens: 10 })
  const other = sequenceRequest({ prompt: Int32Array.of(9), maxTokens: 60 })
  for (let moment = 0; moment <= 12; moment++) {
    const engine = bench({ stepTokens: 8 })
    engine.submit(0, other)
    engine.submit(1, request)
    for (let i = 0; i < moment; i++) engine.step()
    engine.core.abort(1)
    assert.equal(engine.outcome(1).reason, 'abort')
    engine.core.abort(1)
    engine.step()
    const { sequences, kv } = engine.core.snapshot()
    assert.equal(sequences.length, 1)
    assert.equal(kv.usedPages, sequences[0]!.pages, `${moment} steps in`)
    engine.core.abort(0)
    assert.equal(engine.step(), false)
    engine.core.settle()
    assert.equal(engine.core.snapshot().kv.residentBytes, 0, 'nothing runs, yet pages stay')
  }
})

test('idle pages wait for a step that never comes, or are given back at once', () => {
  const engine = bench()
  engine.submit(0, sequenceRequest())
  engine.runAll()
  const endedMs = engine.nowMs
  assert.ok(engine.core.snapshot().kv.residentBytes > 0, 'a successor finds no warm pages')
  engine.settle()
  assert.equal(engine.core.snapshot().kv.residentBytes, 0)
  assert.ok(engine.nowMs - endedMs <= 50, `${engine.nowMs - endedMs} ms`)
})

test('pages of ended sequences stay as long as another one runs', () => {
  const engine = bench()
  for (let id = 0; id < 3; id++) engine.submit(id, sequenceRequest({ maxTokens: 2 }))
  engine.submit(3, sequenceRequest({ prompt: Int32Array.of(1), maxTokens: 70 }))
  for (let i = 0; i < 40; i++) engine.step()
  const { sequences, kv } = engine.core.snapshot()
  assert.equal(sequences.length, 1)
  assert.equal(kv.usedPages, sequences[0]!.pages)
})

test('an answer is written where the prompt of another one lies', () => {
  const engine = bench()
  const memory = Int32Array.of(1, 2, 3, 4, 5, 6, 7)
  const prompts = [memory.subarray(0, 3), memory.subarray(3, 5), memory.subarray(5)]
  prompts.forEach((prompt, id) => engine.submit(id, sequenceRequest({ prompt, maxTokens: 20 })))
  engine.runAll()
  assert.deepEqual([...memory], [1, 2, 3, 4, 5, 6, 7])
  prompts.forEach((prompt, id) => {
    const alone = bench()
    alone.submit(0, sequenceRequest({ prompt: prompt.slice(), maxTokens: 20 }))
    alone.runAll()
    assert.deepEqual(engine.outcomes.get(id)?.tokens, alone.outcomes.get(0)?.tokens)
  })
})

test('a stop token is shown, not counted, or does not stop', () => {
  const request = sequenceRequest({ maxTokens: 20 })
  const { tokens } = expectedOutcome(request)
  const engine = bench()
  const stop = tokens[5]!
  const first = tokens.indexOf(stop)
  engine.submit(0, { ...request, stopTokens: [stop] })
  engine.runAll()
  const { reason, outputTokens, tokens: shown } = engine.outcome(0)
  assert.deepEqual(shown, tokens.slice(0, first))
  assert.deepEqual([reason, outputTokens], ['stop', first + 1])
})

test('max_tokens is off by one, even where the context ends', () => {
  for (const [prompt, maxTokens] of [
    [1, 1],
    [1, CONTEXT - 1],
    [CONTEXT - 1, 1],
  ] as const) {
    // Memory for exactly one full context.
    const engine = bench({}, CONTEXT / 2)
    engine.submit(0, sequenceRequest({ prompt: new Int32Array(prompt), maxTokens }))
    engine.runAll()
    assert.equal(engine.outcome(0).tokens.length, maxTokens)
    assert.equal(engine.outcome(0).reason, 'length')
  }
})

test('logprobs are missing, unasked for, or of another sequence', () => {
  const engine = bench()
  const prompts = [Int32Array.of(4), Int32Array.of(5), Int32Array.of(6)]
  const asked = [undefined, 0, 3]
  prompts.forEach((prompt, id) => {
    engine.submit(id, sequenceRequest({ prompt, topLogprobs: asked[id], maxTokens: 5 }))
  })
  engine.runAll()
  assert.deepEqual(engine.outcome(0).logprobs, Array(5).fill(undefined))
  for (const { logprob, top } of engine.outcome(1).logprobs as { logprob: number; top: [] }[]) {
    assert.ok(logprob < 0 && top.length === 0)
  }
  engine.outcome(2).logprobs.forEach((logprobs, i) => {
    assert.equal(logprobs!.top.length, 3)
    // Greedy: the likeliest is the one that was chosen.
    assert.equal(logprobs!.top[0]!.token, engine.outcome(2).tokens[i])
    assert.equal(logprobs!.top[0]!.logprob, logprobs!.logprob)
  })
})

test('a request that the sampler refuses takes others with it', () => {
  const engine = bench()
  engine.submit(0, sequenceRequest())
  engine.submit(1, sequenceRequest({ sampling: { ...GREEDY, topP: 7 } }))
  engine.submit(2, sequenceRequest({ sampling: { ...GREEDY, logitBias: [[VOCAB, 1]] } }))
  engine.runAll()
  assert.equal(engine.outcome(0).reason, 'length')
  for (const id of [1, 2]) {
    assert.equal(engine.outcome(id).reason, 'error')
    assert.equal(engine.outcome(id).error?.code, 'invalid_request')
  }
  assert.equal(engine.core.snapshot().finished.error, 2)
})

test('a row of NaN ends more than its own sequence', () => {
  const engine = bench({ fault: { atStep: 3, kind: 'nan' } })
  const prompts = [Int32Array.of(4), Int32Array.of(5), Int32Array.of(6)]
  prompts.forEach((prompt, id) => engine.submit(id, sequenceRequest({ prompt })))
  engine.runAll()
  const failed = prompts.filter((_, id) => engine.outcome(id).reason === 'error')
  assert.equal(failed.length, 1)
  prompts.forEach((prompt, id) => {
    const { tokens, reason, error } = engine.outcome(id)
    const expected = expectedOutcome(sequenceRequest({ prompt }))
    assert.deepEqual(tokens, reason === 'error' ? expected.tokens.slice(0, 3) : expected.tokens)
    if (reason === 'error') assert.equal(error?.code, 'backend_failed')
  })
})

test('the failure of a backend is swallowed', () => {
  for (const [kind, message] of [
    ['throw', /null backend failed/],
    ['crash', /null backend crashed/],
  ] as const) {
    const engine = bench({ fault: { atStep: 4, kind } })
    engine.submit(0, sequenceRequest({ maxTokens: 20 }))
    assert.throws(() => engine.runAll(), message)
    assert.equal(engine.outcome(0).tokens.length, 4)
  }
})

test('a snapshot shows a preempted sequence as it is not', () => {
  // Two sequences that fit together at first: 20 pages each of 44, then the second gives way.
  const engine = bench({ maxSequences: 2 }, 44)
  const request = (token: number) =>
    sequenceRequest({ prompt: new Int32Array(10).fill(token), maxTokens: 60 })
  engine.submit(0, { ...request(1), requestId: 'first' })
  engine.submit(1, { ...request(2), requestId: 'second' })
  const seen = new Set<string>()
  let outputs = 0
  while (engine.step()) {
    const { sequences, kv, preemptions, running, waiting } = engine.core.snapshot()
    const pages = sequences.reduce((sum, sequence) => sum + sequence.pages, 0)
    assert.ok(pages <= kv.usedPages)
    assert.equal(sequences.length, running + waiting)
    const second = sequences.find(({ requestId }) => requestId === 'second')
    if (!second) continue
    assert.ok(second.outputTokens >= outputs, 'its output is forgotten')
    outputs = second.outputTokens
    if (preemptions === 0) continue
    seen.add(second.state)
    const { state, kvTokens, bytes } = second
    if (state === 'waiting') assert.deepEqual([kvTokens, bytes, second.pages], [0, 0, 0])
    // Before a decode all tokens but the last are in memory, as many as were known before it.
    if (state === 'decode') assert.equal(kvTokens, 10 + outputs - 1)
    if (state === 'prefill') assert.ok(kvTokens > 0 && kvTokens < 10 + outputs - 1)
    assert.equal(bytes, kvTokens * KV.layers * KV.rowBytes)
  }
  assert.deepEqual([...seen].toSorted(), ['decode', 'prefill', 'waiting'])
  assert.deepEqual(engine.outcome(1).tokens, expectedOutcome(request(2)).tokens)
})

test('an idle engine keeps gigabytes warm until their time is over', () => {
  const kv = { layers: 1, rowBytes: 1 << 20, pageBytes: 1 << 20 }
  const engine = bench({ kv }, 1e6)
  for (let id = 0; id < 4; id++) engine.submit(id, sequenceRequest({ maxTokens: 30 }))
  engine.runAll()
  const resident = () => engine.core.snapshot().kv.residentBytes
  assert.equal(resident(), 4 * 32 * kv.rowBytes)
  while (engine.core.settle() === 0);
  assert.ok(resident() > 0 && resident() <= 64 << 20, `${resident()} bytes`)
  engine.settle()
  assert.equal(resident(), 0)
})

test('memory that cannot be given back passes for the error of a sequence', () => {
  const engine = bench()
  const prompt = new Int32Array(8).fill(1)
  engine.submitChoices([0, 1], sequenceRequest({ prompt, maxTokens: 2 }), [GREEDY, GREEDY])
  engine.step()
  // A fork's page goes back as the fork ends.
  const { kv } = engine.backend
  kv.discard = () => {
    throw new LatticeError('os_call_failed', 'no')
  }
  assert.throws(() => engine.step(), { code: 'os_call_failed' })
  const reasons = [engine.outcome(0).reason, engine.outcome(1).reason]
  assert.ok(!reasons.includes('error'), `${reasons}`)
})
