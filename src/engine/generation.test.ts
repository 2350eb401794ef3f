// Owns the checks of generation: texts and tokens arrive whole however the consumer keeps pace,
// stop strings cut them, and every way of leaving ends the engine's sequences.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { ByteTokenizer, EOS, FakeEngine } from '../../test/support/fake-engine-generation.ts'
import { LatticeError } from '../errors.ts'
import { GREEDY } from './api.ts'
import type { Generation, GenerationEvent, GenerationRequest } from './generation.ts'
import { generate } from './generation.ts'

const tokenizer = new ByteTokenizer()
const tokensOf = (text: string): number[] => [...tokenizer.encode(text)]

function requestOf(change: Partial<GenerationRequest> = {}): GenerationRequest {
  return {
    requestId: 'r',
    tenant: 'default',
    prompt: Int32Array.of(1),
    choices: 1,
    sampling: GREEDY,
    maxTokens: 1e9,
    stop: [],
    ignoreEos: false,
    topLogprobs: undefined,
    ...change,
  }
}

type Finish = Extract<GenerationEvent, { kind: 'finish' }>

/** All events by choice, with the text and tokens put together; checks their order. */
async function collect(generation: Generation, engine: FakeEngine, between = () => engine.step()) {
  const choices: { text: string; tokens: number[]; finish: Finish | undefined }[] = []
  const ticking = setInterval(between, 0)
  try {
    for await (const event of generation.events) {
      const choice = (choices[event.choice] ??= { text: '', tokens: [], finish: undefined })
      assert.equal(choice.finish, undefined, 'an event follows the finish')
      if (event.kind === 'finish') {
        choice.finish = event
      } else {
        assert.ok(event.text !== '' || event.tokens.length > 0, 'an empty delta')
        choice.text += event.text
        choice.tokens.push(...event.tokens.map(({ token }) => token))
      }
    }
  } finally {
    clearInterval(ticking)
  }
  return choices
}

test('the pace of pulling loses, doubles or splits text or tokens', () => {
  const units = fc.array(fc.constantFrom('a', 'b', 'é', '🙂', 'END'), { maxLength: 12 })
  return fc.assert(
    fc.asyncProperty(
      fc.array(units, { minLength: 1, maxLength: 3 }),
      fc.array(fc.integer({ min: 0, max: 4 }), { minLength: 1, maxLength: 30 }),
      fc.boolean(),
      async (texts, pace, stops) => {
        const whole = texts.map((parts) => parts.join(''))
        const engine = new FakeEngine((i) => tokensOf(whole[i]!))
        const stop = stops ? ['END', 'ba'] : []
        const generation = generate(engine, tokenizer, requestOf({ choices: texts.length, stop }))
        let turn = 0
        const choices = await collect(generation, engine, () => {
          for (let i = pace[turn++ % pace.length]!; i >= 0; i--) engine.step()
        })
        whole.forEach((text, i) => {
          const match = stops ? /END|ba/.exec(text) : null
          const end = match === null ? text : text.slice(0, match.index + match[0].length)
          assert.equal(choices[i]!.text, match === null ? text : text.slice(0, match.index))
          assert.deepEqual(choices[i]!.tokens, tokensOf(end))
          assert.deepEqual(choices[i]!.finish, {
            kind: 'finish',
            choice: i,
            reason: match === null ? 'length' : 'stop',
            matched: match?.[0],
            outputTokens: tokensOf(end).length,
            error: undefined,
          })
        })
        engine.step()
        assert.equal(engine.running, 0)
      },
    ),
    { seed: 3, numRuns: 60 },
  )
})

test('tokens between two pulls are not one delta, or a token waits for its text', async () => {
  const engine = new FakeEngine(() => tokensOf('ab🙂'))
  const { events } = generate(engine, tokenizer, requestOf({ topLogprobs: 0 }))
  const iterator = events[Symbol.asyncIterator]()
  const steps = (n: number) => {
    for (let i = 0; i < n; i++) engine.step()
  }
  steps(3)
  const tokens = [97, 98, 240].map((token) => ({ token, logprobs: { logprob: -token, top: [] } }))
  assert.deepEqual((await iterator.next()).value, { kind: 'delta', choice: 0, text: 'ab', tokens })
  const pending = iterator.next()
  await Promise.resolve()
  steps(2)
  const event = (await pending).value as GenerationEvent
  assert.ok(event.kind === 'delta' && event.text === '' && event.tokens.length === 2)
})

test('a half-matched stop string or an unfinished character is lost at the end', async () => {
  const engine = new FakeEngine(() => [...tokensOf('ab##'), 0xf0, 0x9f])
  const generation = generate(engine, tokenizer, requestOf({ stop: ['###', 'b##\ufffdx'] }))
  const [choice] = await collect(generation, engine)
  assert.equal(choice!.text, 'ab##\ufffd')
  assert.equal(choice!.finish!.matched, undefined)
})

test('a stop string that only the last bytes complete goes unseen', async () => {
  const engine = new FakeEngine(() => [...tokensOf('ab'), 0xf0])
  const generation = generate(engine, tokenizer, requestOf({ stop: ['b\ufffd'] }))
  const [choice] = await collect(generation, engine)
  assert.equal(choice!.text, 'a')
  assert.equal(choice!.finish!.reason, 'stop')
  assert.equal(choice!.finish!.matched, 'b\ufffd')
})

test('an end-of-sequence token is shown, not counted, or ends a text that ignores it', async () => {
  const script = () => [...tokensOf('hi'), EOS, ...tokensOf('!')]
  const engine = new FakeEngine(script)
  const [choice] = await collect(generate(engine, tokenizer, requestOf()), engine)
  assert.deepEqual(choice!.tokens, tokensOf('hi'))
  assert.equal(choice!.finish!.reason, 'stop')
  assert.equal(choice!.finish!.matched, undefined)
  assert.equal(choice!.finish!.outputTokens, 3)

  const ignoring = new FakeEngine(script)
  const request = requestOf({ ignoreEos: true })
  const [all] = await collect(generate(ignoring, tokenizer, request), ignoring)
  assert.equal(all!.text, 'hi!')
  assert.equal(all!.finish!.outputTokens, 4)
})

test('choices share a seed, or one that cannot be exact is taken', () => {
  const engine = new FakeEngine(() => [])
  const sampling = { ...GREEDY, seed: 40 }
  generate(engine, tokenizer, requestOf({ choices: 3, sampling }))
  const seeds = engine.sequences.map((sequence) => sequence.request.sampling.seed)
  assert.deepEqual(seeds, [40, 41, 42])
  const large = { ...GREEDY, seed: Number.MAX_SAFE_INTEGER - 1 }
  generate(engine, tokenizer, requestOf({ choices: 2, sampling: large }))
  for (const wrong of [{ choices: 3, sampling: large }, { choices: 0 }, { choices: 129 }]) {
    assert.throws(
      () => generate(engine, tokenizer, requestOf(wrong)),
      (error: unknown) => error instanceof LatticeError && error.code === 'invalid_request',
    )
  }
})

test('a request that is refused is queued in part', () => {
  const engine = new FakeEngine(() => tokensOf('abc'))
  const error = new LatticeError('queue_full', 'The queue is full.')
  engine.failure = { at: 2, error }
  assert.throws(
    () => generate(engine, tokenizer, requestOf({ choices: 4 })),
    (thrown: unknown) => thrown === error,
  )
  assert.equal(engine.sequences.length, 0)
})

test('leaving the loop early leaves sequences running', async () => {
  const engine = new FakeEngine(() => tokensOf('abc'))
  const generation = generate(engine, tokenizer, requestOf({ choices: 2 }))
  engine.step()
  for await (const event of generation.events) {
    assert.equal(event.kind, 'delta')
    break
  }
  engine.step()
  assert.equal(engine.running, 0)
  const after = await generation.events[Symbol.asyncIterator]().next()
  assert.equal(after.done, true)
})

test('a consumer that waits is not told when the loop is left elsewhere', async () => {
  const engine = new FakeEngine(() => tokensOf('abc'))
  const iterator = generate(engine, tokenizer, requestOf()).events[Symbol.asyncIterator]()
  const waiting = [iterator.next(), iterator.next()]
  await Promise.resolve()
  await iterator.return!()
  for (const result of await Promise.all(waiting)) assert.equal(result.done, true)
})

test('abort ends no sequence, or its finish is not told', async () => {
  const engine = new FakeEngine(() => tokensOf('abcdef'))
  const generation = generate(engine, tokenizer, requestOf({ choices: 2, stop: ['bc'] }))
  engine.step()
  engine.step()
  generation.abort()
  generation.abort()
  const choices = await collect(generation, engine)
  for (const { text, finish } of choices) {
    assert.equal(text, 'ab')
    assert.equal(finish!.reason, 'abort')
    assert.equal(finish!.outputTokens, 2)
  }
  generation.abort()
})

test('an engine that speaks during submit, or after the end, confuses the events', async () => {
  const engine = new FakeEngine(() => tokensOf('xEND...'))
  engine.early = 5
  const generation = generate(engine, tokenizer, requestOf({ stop: ['END'] }))
  const sequence = engine.sequences[0]!
  assert.ok(sequence.aborted)
  sequence.sink.onToken(65, undefined)
  sequence.sink.onFinish('error', 99, new LatticeError('internal', 'late'))
  const [choice] = await collect(generation, engine)
  assert.equal(choice!.text, 'x')
  assert.equal(choice!.finish!.outputTokens, 4)
  assert.equal(choice!.finish!.reason, 'stop')
})

test("the engine's or tokenizer's failure does not reach the consumer as a finish", async () => {
  const engine = new FakeEngine(() => tokensOf('abc'))
  const generation = generate(engine, tokenizer, requestOf())
  const error = new LatticeError('backend_failed', 'broken')
  engine.step()
  engine.finish(engine.sequences[0]!, 'error', error)
  const [choice] = await collect(generation, engine)
  assert.equal(choice!.text, 'a')
  assert.equal(choice!.finish!.error, error)

  const broken = new ByteTokenizer()
  broken.detokenizer = () => ({
    push: () => {
      throw new Error('no such token')
    },
    end: () => '',
  })
  const other = new FakeEngine(() => tokensOf('abc'))
  const [failed] = await collect(generate(other, broken, requestOf()), other)
  assert.equal(failed!.finish!.reason, 'error')
  assert.match(failed!.finish!.error!.message, /no such token/)
  assert.ok(other.sequences[0]!.aborted)
})

test('a token costs more than 10 µs between engine and consumer', async () => {
  const engine = new FakeEngine(() => Array.from({ length: 50_000 }, (_, i) => 97 + (i % 20)))
  const generation = generate(engine, tokenizer, requestOf({ stop: ['zzz', 'abd'] }))
  const sequence = engine.sequences[0]!
  let tokens = 0
  let start = performance.now()
  let least = Infinity
  const iterator = generation.events[Symbol.asyncIterator]()
  for (;;) {
    const pending = iterator.next()
    if (!sequence.ended) engine.advance(sequence)
    const { done, value } = await pending
    if (done) break
    if (value.kind === 'delta') tokens += value.tokens.length
    if (tokens % 5000 > 0) continue
    // The least of ten runs: other tests share the machine.
    least = Math.min(least, (performance.now() - start) / 5)
    start = performance.now()
  }
  assert.equal(tokens, 50_000)
  assert.ok(least < 10, `${least.toFixed(2)} µs`)
})
