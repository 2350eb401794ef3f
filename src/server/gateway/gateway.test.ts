// Catches a gateway that reads what will be refused, answers with another text than the server's,
// or drops a parameter in silence.

import assert from 'node:assert/strict'
import { once } from 'node:events'
import { type IncomingMessage, request } from 'node:http'
import { text } from 'node:stream/consumers'
import { test, type TestContext } from 'node:test'
import { fakePeer, type FakePeer } from '../../../test/support/fake-peer.ts'
import { events, over, post, until } from '../../../test/support/http.ts'
import { LatticeClient } from '../../net/client.ts'
import { modelHash } from '../../net/protocol.ts'
import { type Gateway, startGateway } from './gateway.ts'

const KEY = new Uint8Array(16).fill(5)
const WORDS = ['Hél', 'lo', ' ✓']
const MESSAGES = [{ role: 'user', content: 'Hi ☃' }]
const CHAT = '/v1/chat/completions'

async function start(
  t: TestContext,
  endless = false,
): Promise<{ peer: FakePeer; gateway: Gateway }> {
  const peer = await fakePeer(KEY, WORDS, { endless })
  const client = new LatticeClient({ host: '127.0.0.1', port: peer.port, tenant: 2, key: KEY })
  const at = { host: '127.0.0.1', port: 0, apiKeys: [] }
  const gateway = await startGateway({ client, ...at, maxTokens: 100, readFirstBytes: 4096 })
  t.after(async () => {
    await gateway.close()
    peer.close()
  })
  return { peer, gateway }
}

test('an answer is not the server’s, whole or in events', async (t) => {
  const { peer, gateway } = await start(t)
  const body = { model: 'm', messages: MESSAGES, max_tokens: 7, temperature: 0, seed: 4 }
  const whole = await post(over(gateway.url), CHAT, body)
  assert.equal(whole.status, 200)
  assert.equal(whole.json.choices[0].message.content, WORDS.join(''))
  assert.equal(whole.json.choices[0].finish_reason, 'stop')
  assert.equal(whole.json.model, 'm')
  const usage = { prompt_tokens: 11, completion_tokens: 3, total_tokens: 14 }
  assert.deepEqual(whole.json.usage, { ...usage, prompt_tokens_details: { cached_tokens: 3 } })
  const [{ text: prompt, header }] = peer.prompts as [FakePeer['prompts'][0]]
  assert.equal(prompt, JSON.stringify(MESSAGES))
  assert.equal(header.maxTokens, 7)
  assert.equal(header.model, modelHash('m'))
  assert.equal(header.words[3], 4n)
  const init = { method: 'POST', headers: { 'content-type': 'application/json' } }
  const streamed = await fetch(`${gateway.url}${CHAT}`, {
    ...init,
    body: JSON.stringify({ messages: MESSAGES, stream: true }),
  })
  const frames = events(await streamed.text())
  const deltas = frames.slice(0, -1).map(({ choices }) => choices[0].delta.content ?? '')
  assert.equal(deltas.join(''), WORDS.join(''))
  assert.equal(frames.at(-1), '[DONE]')
  const completion = await post(over(gateway.url), '/v1/completions', { prompt: 'Once ' })
  assert.equal(completion.json.choices[0].text, WORDS.join(''))
  assert.equal(peer.prompts.at(-1)?.text, 'Once ')
  assert.equal(peer.prompts.at(-1)?.header.maxTokens, 16)
})

/** Sends the head of a request; its body only when told. */
function head(gateway: Gateway, bytes: number, headers: Record<string, string> = {}) {
  return request(`${gateway.url}${CHAT}`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', 'content-length': bytes, ...headers },
  })
}

test('a body is read that the server has no room for', async (t) => {
  const { peer, gateway } = await start(t)
  peer.refusal = { code: 'rate', retryMs: 2500 }
  for (const expects of [false, true]) {
    const asked = head(gateway, 1e6, expects ? { expect: '100-continue' } : {})
    let continued = false
    asked.on('continue', () => (continued = true)).on('error', () => {})
    asked.flushHeaders()
    const [response] = (await once(asked, 'response')) as [IncomingMessage]
    assert.equal(response.statusCode, 429)
    assert.equal(response.headers['retry-after'], '3')
    assert.equal(response.headers['connection'], 'close')
    assert.equal(JSON.parse(await text(response)).error.code, 'queue_full')
    assert.ok(!continued)
    asked.destroy()
  }
  assert.deepEqual(
    peer.asked.map(({ promptBytes, maxTokens }) => [promptBytes, maxTokens]),
    [
      [1e6, 100],
      [1e6, 100],
    ],
  )
  peer.refusal = { code: 'tenant_busy', retryMs: 0 }
  const small = await post(over(gateway.url), CHAT, { messages: MESSAGES })
  assert.equal(small.status, 429)
  assert.equal(small.headers.get('retry-after'), '1')
})

test('what was granted before the body is asked for again, or is kept unused', async (t) => {
  const { peer, gateway } = await start(t)
  const content = 'x'.repeat(5000)
  const send = async (body: object): Promise<IncomingMessage> => {
    const bytes = Buffer.from(JSON.stringify(body))
    const asked = head(gateway, bytes.length, { expect: '100-continue' })
    asked.on('continue', () => asked.end(bytes))
    const [response] = (await once(asked, 'response')) as [IncomingMessage]
    return response
  }
  const messages = [{ role: 'user', content }]
  const response = await send({ messages, max_tokens: 3 })
  assert.equal(response.statusCode, 200)
  assert.equal(JSON.parse(await text(response)).choices[0].message.content, WORDS.join(''))
  assert.equal(peer.asked.length, 1)
  // Less than was asked for: the prompt is shorter than its body.
  assert.equal(peer.prompts[0]?.text, JSON.stringify(messages))
  assert.equal(peer.prompts[0]?.header.maxTokens, 3)
  // Another model, or more tokens, than was asked for.
  for (const other of [{ model: 'm' }, { max_tokens: 101 }]) {
    const again = await send({ messages, ...other })
    assert.equal(again.statusCode, 200)
    await text(again)
    const [first, second] = peer.asked.slice(-2)
    await until('the first grant is given back', () => peer.cancelled.includes(first!.request))
    assert.equal(second!.model, 'model' in other ? modelHash('m') : 0)
    assert.equal(second!.maxTokens, other.max_tokens ?? 100)
  }
  const wrong = await send({ messages, stop: ['a'] })
  assert.equal(wrong.statusCode, 400)
  await text(wrong)
  const last = peer.asked.at(-1)!
  await until('the grant is given back', () => peer.cancelled.includes(last.request))
})

test('a parameter that is not carried is dropped in silence', async (t) => {
  const { peer, gateway } = await start(t)
  const fields: [string, unknown][] = [
    ['stop', ['a']],
    ['n', 2],
    ['top_k', 5],
    ['logprobs', true],
    ['presence_penalty', 1],
    ['logit_bias', { 5: 1 }],
    ['tools', [{ type: 'function', function: { name: 'f' } }]],
  ]
  for (const [name, value] of fields) {
    const { status, json } = await post(over(gateway.url), CHAT, {
      messages: MESSAGES,
      [name]: value,
    })
    assert.equal(status, 400)
    assert.equal(json.error.code, 'unsupported_parameter')
    assert.equal(json.error.param, name)
  }
  const calls = [{ id: '1', type: 'function', function: { name: 'f', arguments: '{}' } }]
  const called = [{ role: 'assistant', content: '', tool_calls: calls }]
  const { json } = await post(over(gateway.url), CHAT, { messages: called })
  assert.equal(json.error.param, 'messages[0].tool_calls')
  assert.equal(peer.asked.length, 0)
})

test('a client that leaves lets the server go on', async (t) => {
  const { peer, gateway } = await start(t, true)
  const gone = new AbortController()
  const response = await fetch(`${gateway.url}${CHAT}`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ messages: MESSAGES, stream: true }),
    signal: gone.signal,
  })
  await response.body?.getReader().read()
  gone.abort()
  await until('CANCEL', () => peer.cancelled.length > 0)
  assert.equal(peer.cancelled[0], peer.asked[0]?.request)
})

test('a server’s refusal loses its meaning over HTTP', async (t) => {
  const { peer, gateway } = await start(t)
  const meanings = [
    ['busy', 429, 'queue_full'],
    ['model', 404, 'model_not_found'],
    ['too_large', 400, 'context_length_exceeded'],
    ['no_replica', 503, 'engine_stopped'],
    ['clock', 503, 'request_rejected'],
  ] as const
  for (const [code, status, name] of meanings) {
    peer.refusal = { code, retryMs: 0 }
    const answer = await post(over(gateway.url), CHAT, { messages: MESSAGES })
    assert.deepEqual([answer.status, answer.json.error.code], [status, name])
  }
})
