import assert from 'node:assert/strict'
import { test } from 'node:test'
import { LatticeError } from '../../errors.ts'
import { createApp } from '../app.ts'
import { authenticator } from '../auth.ts'
import { fakeApp, fakeTemplate } from '../../../test/support/fake-server.ts'
import { BOS, END_OF_TURN, EOS, fakeTokenizer } from '../../../test/support/fake-tokenizer.ts'
import { post, postStream } from '../../../test/support/http.ts'

const PATH = '/v1/chat/completions'
const USER = [{ role: 'user', content: 'hi' }]

test('a whole answer has OpenAI’s shape, its prompt came from the template', async () => {
  const { app, engine } = fakeApp()
  const { status, headers, json } = await post(app.request, PATH, { messages: USER })
  assert.equal(status, 200)
  const id = headers.get('x-request-id')
  assert.match(id ?? '', /^[0-9a-f]{32}$/)
  assert.ok(Math.abs(json.created - Date.now() / 1000) < 5)
  assert.deepEqual(json, {
    id: `chatcmpl-${id}`,
    object: 'chat.completion',
    created: json.created,
    model: 'fake/model',
    choices: [
      {
        index: 0,
        message: { role: 'assistant', content: 'Hello!', refusal: null },
        logprobs: null,
        finish_reason: 'stop',
      },
    ],
    usage: {
      prompt_tokens: 22,
      completion_tokens: 7,
      total_tokens: 29,
      prompt_tokens_details: { cached_tokens: 0 },
    },
  })
  const prompt = [BOS, ...Buffer.from('user: hi'), END_OF_TURN, ...Buffer.from('\nassistant: ')]
  assert.deepEqual([...engine.requests[0]!.prompt], prompt)
  assert.deepEqual(engine.requests[0]!.stopTokens, [EOS, END_OF_TURN])
  assert.equal(engine.requests[0]!.maxTokens, 1024 - 22)
  assert.equal(engine.requests[0]!.requestId, id)
})

test('cached tokens of the prompt are not told, or once for each choice', async () => {
  const { app, engine } = fakeApp({ cachedTokens: 9 })
  const { json } = await post(app.request, PATH, { messages: USER, n: 3 })
  assert.deepEqual(json.usage.prompt_tokens_details, { cached_tokens: 9 })
  assert.deepEqual(engine.groups, [3], 'choices do not share their prompt')
})

test('a stream’s frames are byte for byte what clients parse, usage last', async () => {
  const { app } = fakeApp({ reply: () => 'é"' })
  const response = await app.request(PATH, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ messages: USER, stream: true, stream_options: { include_usage: true } }),
  })
  assert.equal(response.headers.get('content-type'), 'text/event-stream; charset=utf-8')
  const id = `chatcmpl-${response.headers.get('x-request-id')}`
  const text = (await response.text())
    .replaceAll(id, 'ID')
    .replaceAll(/"created":\d+/g, '"created":0')
  const head = 'data: {"id":"ID","object":"chat.completion.chunk","created":0,"model":"fake/model",'
  const chunk = (delta: string, finish: string): string =>
    `${head}"choices":[{"index":0,"delta":${delta},"logprobs":null,"finish_reason":${finish}}],` +
    '"usage":null}\n\n'
  assert.equal(
    text,
    chunk('{"role":"assistant","content":"","refusal":null}', 'null') +
      chunk('{"content":"é"}', 'null') +
      chunk('{"content":"\\""}', 'null') +
      chunk('{}', '"stop"') +
      `${head}"choices":[],"usage":{"prompt_tokens":22,"completion_tokens":4,"total_tokens":26,` +
      '"prompt_tokens_details":{"cached_tokens":0}}}\n\n' +
      'data: [DONE]\n\n',
  )
})

test('without include_usage no frame speaks of usage', async () => {
  const { app } = fakeApp()
  const frames = await postStream(app.request, PATH, { messages: USER })
  assert.equal(frames.at(-1), '[DONE]')
  for (const frame of frames.slice(0, -1)) assert.equal('usage' in frame, false)
})

test('n choices keep their index, their seed and their text when streamed', async () => {
  const reply = ({ sampling }: { sampling: { seed: number } }): string => `seed ${sampling.seed}`
  const { app } = fakeApp({ reply })
  const body = { messages: USER, n: 3, seed: 40 }
  const whole = await post(app.request, PATH, body)
  const texts = whole.json.choices.map((choice: any) => choice.message.content)
  assert.deepEqual(texts, ['seed 40', 'seed 41', 'seed 42'])
  const streamed = ['', '', '']
  const roles = [0, 0, 0]
  for (const frame of await postStream(app.request, PATH, body)) {
    for (const { index, delta } of frame.choices ?? []) {
      streamed[index] += delta.content ?? ''
      if (delta.role === 'assistant') roles[index]!++
    }
  }
  assert.deepEqual(streamed, texts)
  assert.deepEqual(roles, [1, 1, 1])
  assert.equal(whole.json.usage.prompt_tokens, 22)
  assert.equal(whole.json.usage.completion_tokens, 3 * 8)
})

test('logprobs carry exact bytes even for half a character', async () => {
  const { app } = fakeApp({ reply: () => 'é' })
  const body = { messages: USER, logprobs: true, top_logprobs: 2, max_tokens: 2 }
  const { json } = await post(app.request, PATH, body)
  const entry = (byte: number, rank: number): object => ({
    token: Buffer.of(byte).toString(),
    logprob: -rank * Math.LN2,
    bytes: [byte],
  })
  const [first, second] = Buffer.from('é') as unknown as [number, number]
  assert.deepEqual(json.choices[0].logprobs, {
    content: [first, second].map((byte) => ({
      ...entry(byte, 1),
      top_logprobs: [entry(byte, 1), entry(byte + 1, 2)],
    })),
    refusal: null,
  })
  const frames = await postStream(app.request, PATH, body)
  const streamed = frames.flatMap((frame) => frame.choices?.[0]?.logprobs?.content ?? [])
  assert.deepEqual(streamed, json.choices[0].logprobs.content)
})

test('a stop string ends the answer and never shows, even when it arrives in pieces', async () => {
  const { app } = fakeApp({ reply: () => 'one STOP two' })
  for (const stop of ['STOP', ['nope', 'STOP']]) {
    const { json } = await post(app.request, PATH, { messages: USER, stop })
    assert.equal(json.choices[0].message.content, 'one ')
    assert.equal(json.choices[0].finish_reason, 'stop')
    const frames = await postStream(app.request, PATH, { messages: USER, stop })
    const text = frames.map((frame) => frame.choices?.[0]?.delta?.content ?? '').join('')
    assert.equal(text, 'one ')
  }
})

test('max_tokens and max_completion_tokens bound the answer, which then says length', async () => {
  const { app } = fakeApp()
  for (const name of ['max_tokens', 'max_completion_tokens']) {
    const { json } = await post(app.request, PATH, { messages: USER, [name]: 2 })
    assert.equal(json.choices[0].message.content, 'He')
    assert.equal(json.choices[0].finish_reason, 'length')
  }
  const both = { messages: USER, max_tokens: 2, max_completion_tokens: 3 }
  assert.equal((await post(app.request, PATH, both)).json.error.param, 'max_tokens')
})

test('every sampling parameter reaches the engine, absent ones by OpenAI’s defaults', async () => {
  const { app, engine } = fakeApp()
  const given = {
    temperature: 0.5,
    top_k: 7,
    top_p: 0.9,
    min_p: 0.1,
    typical_p: 0.8,
    repetition_penalty: 1.1,
    presence_penalty: -1,
    frequency_penalty: 2,
    logit_bias: { 65: -100, 66: 1.5 },
    seed: 11,
  }
  await post(app.request, PATH, { messages: USER, ...given, ignore_eos: true, max_tokens: 1 })
  assert.deepEqual(engine.requests[0]!.sampling, {
    temperature: 0.5,
    topK: 7,
    topP: 0.9,
    minP: 0.1,
    typicalP: 0.8,
    repetitionPenalty: 1.1,
    presencePenalty: -1,
    frequencyPenalty: 2,
    logitBias: [
      [65, -100],
      [66, 1.5],
    ],
    seed: 11,
  })
  assert.deepEqual(engine.requests[0]!.stopTokens, [])
  await post(app.request, PATH, { messages: USER })
  const { seed, ...defaults } = engine.requests[1]!.sampling
  assert.ok(Number.isSafeInteger(seed))
  assert.deepEqual(defaults, {
    temperature: 1,
    topK: 0,
    topP: 1,
    minP: 0,
    typicalP: 1,
    repetitionPenalty: 1,
    presencePenalty: 0,
    frequencyPenalty: 0,
    logitBias: [],
  })
})

test('a conversation with tools reaches the template as templates expect it', async () => {
  const { app, engine } = fakeApp()
  const parameters = { type: 'object', properties: { city: { type: 'string' } } }
  const tool = { type: 'function', function: { name: 'weather', parameters } }
  const call = { name: 'weather', arguments: '{"city": "Rome"}' }
  await post(app.request, PATH, {
    messages: [
      { role: 'developer', content: 'be brief' },
      {
        role: 'user',
        content: [
          { type: 'text', text: 'a' },
          { type: 'text', text: 'b' },
        ],
      },
      {
        role: 'assistant',
        content: null,
        tool_calls: [{ id: 'x', type: 'function', function: call }],
      },
      { role: 'tool', tool_call_id: 'x', content: 'sunny' },
    ],
    tools: [tool],
  })
  const prompt = fakeTokenizer().decode(engine.requests[0]!.prompt)
  const object =
    '[{"id":"x","type":"function","function":{"name":"weather","arguments":{"city":"Rome"}}}]'
  assert.equal(
    prompt,
    `<|bos|>tools: ${JSON.stringify([tool])}\n` +
      'system: be brief<|end|>\nuser: a\nb<|end|>\n' +
      `assistant:  ${object}<|end|>\ntool: sunny<|end|>\nassistant: `,
  )
})

test('a model whose template writes no tools answers as if there were none', async () => {
  const { app, context, engine } = fakeApp()
  const plain = createApp(
    { ...context, template: { ...fakeTemplate, takesTools: false } },
    authenticator([]),
  )
  const body = { messages: USER, tools: TOOLS }
  const { status, json } = await post(plain.request, PATH, body)
  assert.deepEqual([status, json.error.code, json.error.param], [400, ...REFUSED_TOOLS])
  assert.equal(engine.requests.length, 0)
  assert.equal((await post(app.request, PATH, body)).status, 200)
  const hidden = { ...body, tool_choice: 'none' }
  assert.equal((await post(plain.request, PATH, hidden)).status, 200)
})

const REFUSED_TOOLS = ['unsupported_parameter', 'tools']
const TOOLS = [{ type: 'function', function: { name: 'weather' } }]
const CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'

test('a tool call in the text becomes tool_calls, whole and streamed', async () => {
  const { app } = fakeApp({ reply: () => `Let me see. ${CALL}\n${CALL}` })
  const { json } = await post(app.request, PATH, { messages: USER, tools: TOOLS })
  const { message, finish_reason } = json.choices[0]
  assert.equal(finish_reason, 'tool_calls')
  assert.equal(message.content, 'Let me see. ')
  assert.equal(message.tool_calls.length, 2)
  for (const call of message.tool_calls) {
    assert.match(call.id, /^call_[0-9a-f]{24}$/)
    assert.deepEqual(call.function, { name: 'weather', arguments: '{"city":"Rome"}' })
  }
  const frames = await postStream(app.request, PATH, { messages: USER, tools: TOOLS })
  const deltas = frames.flatMap((frame) => frame.choices ?? []).map((choice: any) => choice.delta)
  assert.equal(deltas.map((delta) => delta.content ?? '').join(''), 'Let me see. ')
  const calls = deltas.flatMap((delta) => delta.tool_calls ?? [])
  assert.deepEqual(
    calls.map((call) => [call.index, call.type, call.function.arguments]),
    [
      [0, 'function', '{"city":"Rome"}'],
      [1, 'function', '{"city":"Rome"}'],
    ],
  )
  assert.equal(frames.at(-2).choices[0].finish_reason, 'tool_calls')
})

test('with tool_choice none neither prompt nor answer knows of tools', async () => {
  const { app, engine } = fakeApp({ reply: () => CALL })
  const body = { messages: USER, tools: TOOLS, tool_choice: 'none' }
  const { json } = await post(app.request, PATH, body)
  assert.equal(json.choices[0].message.content, CALL)
  assert.equal(json.choices[0].finish_reason, 'stop')
  assert.doesNotMatch(fakeTokenizer().decode(engine.requests[0]!.prompt), /tools/)
})

test('an error of the engine is a status when whole, and an event that ends a stream', async () => {
  const error = new LatticeError('backend_failed', 'The device is gone.', { todo: 'Restart.' })
  const { app, context } = fakeApp({ failure: { afterTokens: 2, error } })
  const whole = await post(app.request, PATH, { messages: USER, n: 2 })
  assert.equal(whole.status, 500)
  const expected = {
    message: 'The device is gone. Restart.',
    type: 'server_error',
    param: null,
    code: 'backend_failed',
  }
  assert.deepEqual(whole.json.error, expected)
  const frames = await postStream(app.request, PATH, { messages: USER })
  assert.deepEqual(frames.at(-1), { error: expected })
  assert.equal(frames.length, 4)
  assert.equal(context.metrics.requestAborts.get(['error']), 2)
})

test('a prompt that does not fit is refused with both numbers', async () => {
  const { app } = fakeApp({ contextLength: 32 })
  const long = await post(app.request, PATH, {
    messages: [{ role: 'user', content: 'x'.repeat(50) }],
  })
  assert.equal(long.status, 400)
  assert.equal(long.json.error.code, 'context_length_exceeded')
  assert.match(long.json.error.message, /\b70 tokens.*\b32\b/)
  const more = await post(app.request, PATH, { messages: USER, max_tokens: 11 })
  assert.equal(more.json.error.code, 'context_length_exceeded')
  assert.match(more.json.error.message, /22 prompt tokens and 11 more.*\b32\b.*at most 10/)
  assert.equal((await post(app.request, PATH, { messages: USER, max_tokens: 10 })).status, 200)
})

test('a full queue is 429 with Retry-After, and nothing of the request stays', async () => {
  const { app, engine } = fakeApp({ maxQueue: 2 })
  const { status, headers, json } = await post(app.request, PATH, { messages: USER, n: 3 })
  assert.equal(status, 429)
  assert.equal(json.error.code, 'queue_full')
  assert.equal(json.error.type, 'rate_limit_error')
  assert.equal(headers.get('retry-after'), '1')
  await new Promise((resolve) => setTimeout(resolve, 20))
  const { running, waiting } = await engine.snapshot()
  assert.deepEqual([running, waiting], [0, 0])
})

test('a model without a template refuses chat and says what to use', async () => {
  const { app, context } = fakeApp()
  Object.assign(context, { template: undefined })
  const { status, json } = await post(app.request, PATH, { messages: USER })
  assert.equal(status, 400)
  assert.equal(json.error.code, 'template_invalid')
  assert.match(json.error.message, /\/v1\/completions/)
})
