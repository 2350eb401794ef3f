import assert from 'node:assert/strict'
import { test } from 'node:test'
import { fakeApp } from '../../../test/support/fake-server.ts'
import { BOS, fakeTokenizer } from '../../../test/support/fake-tokenizer.ts'
import { post, postStream } from '../../../test/support/http.ts'

const PATH = '/v1/completions'

/** Answers with its own prompt, so that choices can be told apart. */
const reply = ({ prompt }: { prompt: Int32Array }): string =>
  `re ${fakeTokenizer().decode(prompt, { skipSpecial: true })}`

test('a whole answer has OpenAI’s shape and 16 tokens at most by default', async () => {
  const { app, engine } = fakeApp({ reply })
  const { headers, json } = await post(app.request, PATH, { prompt: 'abc' })
  assert.deepEqual(json, {
    id: `cmpl-${headers.get('x-request-id')}`,
    object: 'text_completion',
    created: json.created,
    model: 'fake/model',
    choices: [{ index: 0, text: 're abc', logprobs: null, finish_reason: 'stop' }],
    usage: {
      prompt_tokens: 4,
      completion_tokens: 7,
      total_tokens: 11,
      prompt_tokens_details: { cached_tokens: 0 },
    },
  })
  assert.equal(engine.requests[0]!.maxTokens, 16)
  assert.equal(engine.requests[0]!.prompt[0], BOS)
})

test('the default of 16 gives way to a context with less room; a wish does not', async () => {
  const { app, engine } = fakeApp({ contextLength: 8 })
  await post(app.request, PATH, { prompt: 'abc' })
  assert.equal(engine.requests[0]!.maxTokens, 4)
  const { json } = await post(app.request, PATH, { prompt: 'abc', max_tokens: 5 })
  assert.equal(json.error.code, 'context_length_exceeded')
})

test('each kind of prompt gives its choices in OpenAI’s order', async () => {
  const { app } = fakeApp({ reply })
  const tokens = (text: string): number[] => [...Buffer.from(text)]
  const texts = async (prompt: unknown, n = 1): Promise<string[]> => {
    const { json } = await post(app.request, PATH, { prompt, n })
    const indexes = json.choices.map((choice: any) => choice.index)
    assert.deepEqual(indexes, [...indexes.keys()])
    return json.choices.map((choice: any) => choice.text)
  }
  assert.deepEqual(await texts('a'), ['re a'])
  assert.deepEqual(await texts(['a', 'b']), ['re a', 're b'])
  assert.deepEqual(await texts(tokens('ab')), ['re ab'])
  assert.deepEqual(await texts([tokens('a'), tokens('b')], 2), ['re a', 're a', 're b', 're b'])
  assert.deepEqual(await texts('<|end|>x'), ['re x'])
})

test('streamed choices of several prompts carry the index of the whole answer', async () => {
  const { app } = fakeApp({ reply })
  const body = { prompt: ['a', 'b'], n: 2, echo: true }
  const streamed = ['', '', '', '']
  const finished: string[] = []
  for (const frame of await postStream(app.request, PATH, body)) {
    if (frame === '[DONE]') continue
    const [choice] = frame.choices
    streamed[choice.index] += choice.text
    if (choice.finish_reason) finished[choice.index] = choice.finish_reason
  }
  assert.deepEqual(streamed, ['are a', 'are a', 'bre b', 'bre b'])
  assert.deepEqual(finished, ['stop', 'stop', 'stop', 'stop'])
  const { json } = await post(app.request, PATH, body)
  assert.deepEqual(
    json.choices.map((choice: any) => choice.text),
    streamed,
  )
})

test('logprobs are four parallel lists, streamed as whole', async () => {
  const { app } = fakeApp({ reply: () => 'Hi' })
  const body = { prompt: 'x', logprobs: 2 }
  const { json } = await post(app.request, PATH, body)
  const ln2 = -Math.LN2
  assert.deepEqual(json.choices[0].logprobs, {
    tokens: ['H', 'i'],
    token_logprobs: [ln2, ln2],
    top_logprobs: [
      { H: ln2, I: 2 * ln2 },
      { i: ln2, j: 2 * ln2 },
    ],
    text_offset: [0, 1],
  })
  const frames = await postStream(app.request, PATH, body)
  const columns = frames.map((frame) => frame.choices?.[0].logprobs).filter(Boolean)
  assert.deepEqual(
    columns.flatMap((column) => column.text_offset),
    [0, 1],
  )
  assert.deepEqual(
    columns.flatMap((column) => column.tokens),
    ['H', 'i'],
  )
})

test('text offsets count whole characters where one takes several tokens', async () => {
  const { app } = fakeApp({ reply: () => 'aé💥b' })
  const { json } = await post(app.request, PATH, { prompt: 'x', logprobs: 0 })
  const { tokens, text_offset } = json.choices[0].logprobs
  assert.equal(tokens.length, 8)
  assert.deepEqual(text_offset, [0, 1, 1, 2, 2, 2, 2, 4])
  assert.equal(json.choices[0].text.indexOf('b'), 4)
})

test('a text of megabytes is refused by its length, before it is encoded', async () => {
  const { app, context } = fakeApp()
  const encode = context.tokenizer.encode
  let longest = 0
  context.tokenizer.encode = (text, options) => {
    longest = Math.max(longest, text.length)
    return encode(text, options)
  }
  const { status, json } = await post(app.request, PATH, { prompt: 'x'.repeat(4 << 20) })
  assert.equal(status, 400)
  assert.equal(json.error.code, 'context_length_exceeded')
  assert.match(json.error.message, /at least \d+ tokens.*\b1024\b/)
  assert.equal(longest, 0)
})

test('a queue with room for one prompt of two takes neither', async () => {
  const { app, engine } = fakeApp({ maxQueue: 1 })
  const { status } = await post(app.request, PATH, { prompt: ['a', 'b'] })
  assert.equal(status, 429)
  await new Promise((resolve) => setTimeout(resolve, 20))
  const { running, waiting, finished } = await engine.snapshot()
  assert.deepEqual([running, waiting, finished.abort], [0, 0, 1])
})

test('best_of returns others than the best, in another order, or hides their cost', async () => {
  const scores = [-3, -1, -9, -2]
  const { app, engine } = fakeApp({
    reply: ({ sampling }) => `seed ${sampling.seed}`,
    score: ({ sampling }) => scores[sampling.seed - 7]!,
  })
  const body = { prompt: 'abc', best_of: 4, n: 2, seed: 7 }
  const { json } = await post(app.request, PATH, body)
  const texts = json.choices.map(({ text }: { text: string }) => text)
  assert.deepEqual(texts, ['seed 8', 'seed 10'])
  assert.deepEqual(
    json.choices.map(({ index, logprobs }: { index: number; logprobs: null }) => [index, logprobs]),
    [
      [0, null],
      [1, null],
    ],
  )
  // Six letters and an end token each, but seven for seed 10.
  assert.equal(json.usage.completion_tokens, 3 * 7 + 8)
  assert.equal(json.usage.prompt_tokens, 4)
  const asked = await post(app.request, PATH, { ...body, logprobs: 1 })
  assert.equal(asked.json.choices[1].logprobs.tokens.length, 7)
  assert.equal(engine.requests.length, 8)
})

test('a beam search reaches the engine as something else', async () => {
  const { app, engine } = fakeApp({ reply })
  const body = { prompt: 'a', use_beam_search: true, best_of: 4, n: 2, early_stopping: 'never' }
  const { json } = await post(app.request, PATH, { ...body, length_penalty: 0.5 })
  assert.equal(json.choices.length, 2)
  assert.equal(engine.requests.length, 2)
  const { beams, sampling } = engine.requests[0]!
  assert.deepEqual(beams, { width: 4, lengthPenalty: 0.5, earlyStopping: 'never' })
  assert.equal(sampling.temperature, 0)
})
