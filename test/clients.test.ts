import assert from 'node:assert/strict'
import { test } from 'node:test'
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { generateText, jsonSchema, streamText, tool } from 'ai'
import OpenAI from 'openai'
import { LatticeError } from '../src/errors.ts'
import { fakeServer } from './support/fake-server.ts'
import { until } from './support/http.ts'

const MODEL = 'fake/model'
const MESSAGES = [{ role: 'user' as const, content: 'hi' }]
const CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'

const openai = (url: string): OpenAI =>
  new OpenAI({ baseURL: `${url}/v1`, apiKey: 'none', maxRetries: 0 })

test('openai: chat, whole and streamed, with usage', async () => {
  await using server = await fakeServer()
  const client = openai(server.url)
  const whole = await client.chat.completions.create({ model: MODEL, messages: MESSAGES })
  assert.equal(whole.choices[0]!.message.content, 'Hello!')
  assert.equal(whole.usage!.total_tokens, 29)
  assert.equal(whole.usage!.prompt_tokens_details!.cached_tokens, 0)
  const stream = client.chat.completions.stream({
    model: MODEL,
    messages: MESSAGES,
    stream_options: { include_usage: true },
  })
  let text = ''
  stream.on('content', (delta) => (text += delta))
  const final = await stream.finalChatCompletion()
  assert.equal(text, 'Hello!')
  assert.equal(final.choices[0]!.message.content, 'Hello!')
  assert.equal(final.choices[0]!.finish_reason, 'stop')
  assert.equal((await stream.totalUsage()).completion_tokens, 7)
})

test('openai: the answer’s message can be sent back in the next turn', async () => {
  await using server = await fakeServer({ reply: () => CALL })
  const client = openai(server.url)
  const tools = [{ type: 'function' as const, function: { name: 'weather', parameters: {} } }]
  const first = await client.chat.completions.create({ model: MODEL, messages: MESSAGES, tools })
  const { message } = first.choices[0]!
  const second = await client.chat.completions.create({
    model: MODEL,
    messages: [
      ...MESSAGES,
      message,
      { role: 'tool', tool_call_id: message.tool_calls![0]!.id, content: 'sunny' },
    ],
    tools,
  })
  assert.equal(second.choices[0]!.finish_reason, 'tool_calls')
})

test('openai: n, logprobs and seed', async () => {
  await using server = await fakeServer({ reply: ({ sampling }) => `s${sampling.seed}` })
  const answer = await openai(server.url).chat.completions.create({
    model: MODEL,
    messages: MESSAGES,
    n: 2,
    seed: 5,
    logprobs: true,
    top_logprobs: 3,
  })
  assert.deepEqual(
    answer.choices.map(({ message }) => message.content),
    ['s5', 's6'],
  )
  for (const { logprobs } of answer.choices) {
    assert.deepEqual(
      logprobs!.content!.map(({ top_logprobs }) => top_logprobs.length),
      [3, 3],
    )
    assert.equal(logprobs!.content![0]!.token, 's')
  }
})

test('openai: tools, streamed', async () => {
  await using server = await fakeServer({ reply: () => CALL })
  const stream = openai(server.url).chat.completions.stream({
    model: MODEL,
    messages: MESSAGES,
    tools: [{ type: 'function', function: { name: 'weather', parameters: {} } }],
  })
  const final = await stream.finalChatCompletion()
  const [call] = final.choices[0]!.message.tool_calls!
  assert.ok(call?.type === 'function')
  assert.deepEqual(JSON.parse(call.function.arguments), { city: 'Rome' })
  assert.equal(final.choices[0]!.finish_reason, 'tool_calls')
})

test('openai: completions, whole and streamed, and models', async () => {
  await using server = await fakeServer()
  const client = openai(server.url)
  const whole = await client.completions.create({ model: MODEL, prompt: ['a', 'b'], logprobs: 1 })
  assert.deepEqual(
    whole.choices.map(({ text }) => text),
    ['Hello!', 'Hello!'],
  )
  assert.equal(whole.choices[0]!.logprobs!.tokens![0], 'H')
  let text = ''
  for await (const chunk of await client.completions.create({
    model: MODEL,
    prompt: 'a',
    stream: true,
  })) {
    text += chunk.choices[0]!.text
  }
  assert.equal(text, 'Hello!')
  assert.deepEqual(
    (await client.models.list()).data.map(({ id }) => id),
    [MODEL],
  )
  assert.equal((await client.models.retrieve(MODEL)).id, MODEL)
})

test('openai: errors arrive as its own classes, in a stream too', async () => {
  await using server = await fakeServer()
  const client = openai(server.url)
  const create = (more: object): Promise<unknown> =>
    client.chat.completions.create({ model: MODEL, messages: MESSAGES, ...more })
  await assert.rejects(create({ model: 'x' }), OpenAI.NotFoundError)
  await assert.rejects(create({ temperature: 9 }), (error: unknown) => {
    assert.ok(error instanceof OpenAI.BadRequestError)
    assert.deepEqual([error.code, error.param], ['invalid_request', 'temperature'])
    return true
  })
  const error = new LatticeError('backend_failed', 'The device is gone.')
  await using failing = await fakeServer({ failure: { afterTokens: 1, error } })
  const stream = openai(failing.url).chat.completions.stream({ model: MODEL, messages: MESSAGES })
  await assert.rejects(stream.finalChatCompletion(), /The device is gone/)
})

test('openai: an aborted stream ends its sequence', async () => {
  await using server = await fakeServer({ stepMs: 2, contextLength: 4096 })
  const stream = openai(server.url).chat.completions.stream({
    model: MODEL,
    messages: MESSAGES,
    ignore_eos: true,
  })
  for await (const chunk of stream) if (chunk.choices[0]?.delta.content === 'e') break
  await until('the abort', () => server.engine.aborts.length === 1)
})

const provider = (baseURL: string) =>
  createOpenAICompatible({ name: 'lattice', baseURL: `${baseURL}/v1`, includeUsage: true })

test('ai SDK: generateText and streamText, with usage', async () => {
  await using server = await fakeServer()
  const model = provider(server.url)(MODEL)
  const whole = await generateText({ model, system: 'be brief', prompt: 'hi', temperature: 0 })
  assert.equal(whole.text, 'Hello!')
  assert.equal(whole.finishReason, 'stop')
  assert.equal(whole.usage.outputTokens, 7)
  const streamed = streamText({ model, prompt: 'hi', maxOutputTokens: 3 })
  let text = ''
  for await (const delta of streamed.textStream) text += delta
  assert.equal(text, 'Hel')
  assert.equal(await streamed.finishReason, 'length')
  assert.equal((await streamed.usage).outputTokens, 3)
})

test('ai SDK: a tool is called, and its result goes into the next step', async () => {
  const reply = ({ prompt }: { prompt: Int32Array }): string =>
    Buffer.from(prompt.filter((token) => token < 256)).includes('sunny') ? 'It is sunny.' : CALL
  await using server = await fakeServer({ reply, contextLength: 4096 })
  const inputSchema = jsonSchema<{ city: string }>({
    type: 'object',
    properties: { city: { type: 'string' } },
  })
  const asked: string[] = []
  const weather = tool({
    description: 'the weather of a city',
    inputSchema,
    execute: async ({ city }) => {
      asked.push(city)
      return 'sunny'
    },
  })
  const stopWhen = ({ steps }: { steps: unknown[] }): boolean => steps.length === 2
  const model = provider(server.url)(MODEL)
  const options = { model, prompt: 'weather?', tools: { weather }, stopWhen }
  assert.equal((await generateText(options)).text, 'It is sunny.')
  assert.equal(await streamText(options).text, 'It is sunny.')
  assert.deepEqual(asked, ['Rome', 'Rome'])
})

test('ai SDK: completions, and an abort that ends the sequence', async () => {
  await using server = await fakeServer({
    stepMs: 2,
    contextLength: 4096,
    reply: () => 'x'.repeat(3000),
  })
  const { text } = await generateText({
    model: provider(server.url).completionModel(MODEL),
    prompt: 'hi',
    maxOutputTokens: 4,
  })
  assert.equal(text, 'xxxx')
  const stop = new AbortController()
  const streamed = streamText({
    model: provider(server.url)(MODEL),
    prompt: 'hi',
    abortSignal: stop.signal,
  })
  for await (const delta of streamed.textStream) if (delta) stop.abort()
  await until('the abort', () => server.engine.aborts.length === 1)
})
