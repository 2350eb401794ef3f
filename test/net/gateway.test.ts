// Catches a gateway that loses a request between HTTP and a real server over datagrams: its text,
// its refusal, its end.

import assert from 'node:assert/strict'
import { setTimeout as sleep } from 'node:timers/promises'
import { test, type TestContext } from 'node:test'
import { events } from '../support/http.ts'
import type { HttpAnswered, HttpAsked } from './http.ts'
import { WITHOUT_ROOT } from './namespaces.ts'
import { AS_TENANT, lattice, SEVEN, serving, start, URL_OF_SERVER } from './serving.ts'

const skip = WITHOUT_ROOT
const GATEWAY = 'http://127.0.0.1:8098'
const CONTEXT = 4096
const MESSAGES = [{ role: 'user', content: 'Why is the sky blue?' }]
/** Has tokens for about one small request a second, and never for more than 200. */
const POOR = { ...SEVEN, tenant: 8, name: 'eight', tokens_per_second: 10, burst_tokens: 200 }

interface Counts {
  running: number
  counters: Record<string, number>
  tenants: { sent: { tokens: number } }[]
}

async function gateway(t: TestContext, env: object = AS_TENANT) {
  const tenants = [SEVEN, POOR]
  const flags = ['--net', 'veth-s']
  const { two } = await serving(t, { tenants, flags, contextLength: CONTEXT })
  const at = ['--to', 'lattice://10.99.0.2', '--listen', '127.0.0.1:8098', '--max-tokens', '50']
  const argv = ['gateway', ...at, '--read-first', '4096']
  await start(t, two.client.namespace, argv, /^Forwarding http/m, env)
  return {
    ask: (body: object, change: Partial<HttpAsked> = {}): Promise<HttpAnswered> => {
      const url = `${GATEWAY}/v1/chat/completions`
      return two.client.call('http', { url, body: JSON.stringify(body), ...change })
    },
    /** The server's own answer, over HTTP. */
    askServer: (body: object): Promise<HttpAnswered> => {
      const url = `${URL_OF_SERVER}/v1/chat/completions`
      return two.server.call('http', { url, body: JSON.stringify(body) })
    },
    async counts(): Promise<Counts> {
      const argv = ['net', 'status', '--json', '--url', URL_OF_SERVER]
      return JSON.parse((await lattice(two.server.namespace, argv)).stdout)
    },
  }
}

test(
  'an answer over the gateway is not the one that the server gives over HTTP',
  { skip },
  async (t) => {
    const { ask, askServer, counts } = await gateway(t)
    const body = { messages: MESSAGES, max_tokens: 20, temperature: 0 }
    const [whole, own] = [await ask(body), await askServer(body)]
    assert.equal(whole.status, 200, whole.text)
    const [ours, theirs] = [JSON.parse(whole.text), JSON.parse(own.text)]
    assert.deepEqual(ours.choices, theirs.choices)
    assert.deepEqual(ours.usage.completion_tokens, theirs.usage.completion_tokens)
    assert.deepEqual(ours.usage.prompt_tokens, theirs.usage.prompt_tokens)
    const stream = { ...body, stream: true, stream_options: { include_usage: true } }
    const streamed = await ask(stream)
    assert.match(String(streamed.headers['content-type']), /^text\/event-stream/)
    const frames = events(streamed.text)
    const text = frames.slice(0, -1).map(({ choices }) => choices[0]?.delta.content ?? '')
    assert.equal(text.join(''), theirs.choices[0].message.content)
    assert.deepEqual(frames.at(-2).usage.completion_tokens, 20)
    assert.equal(frames.at(-1), '[DONE]')
    // A body that waits to be asked for is asked for once there is room for it.
    const waiting = await ask(body, { expects: true })
    assert.ok(waiting.continued)
    assert.deepEqual(JSON.parse(waiting.text).choices, ours.choices)
    const large = { ...body, messages: [{ role: 'user', content: 'x'.repeat(3000) }] }
    assert.equal((await ask({ ...large, user: 'u'.repeat(2000) })).status, 200)
    const { counters, running } = await counts()
    assert.deepEqual([counters['granted'], counters['rejected'], running], [4, 0, 0])
  },
)

test('what the server refuses is read, or refused for another reason', { skip }, async (t) => {
  const { ask, counts } = await gateway(t)
  const reason = ({ text }: HttpAnswered) => JSON.parse(text).error.code
  const tooLong = { messages: MESSAGES, max_tokens: CONTEXT, temperature: 0 }
  for (const stream of [false, true]) {
    const refused = await ask({ ...tooLong, stream })
    assert.deepEqual([refused.status, reason(refused)], [400, 'context_length_exceeded'])
  }
  const other = await ask({ model: 'another', messages: MESSAGES })
  assert.deepEqual([other.status, reason(other)], [404, 'model_not_found'])
  // Larger than any server reads: nobody is asked.
  const before = (await counts()).counters['hello']
  const headers = { 'content-length': String(2 ** 40) }
  const huge = await ask({ messages: MESSAGES }, { expects: true, headers })
  assert.deepEqual([huge.status, reason(huge)], [413, 'body_too_large'])
  assert.ok(!huge.continued)
  const plain = { 'content-type': 'text/plain', 'content-length': '10000' }
  const wrong = await ask({ messages: MESSAGES }, { expects: true, headers: plain })
  assert.deepEqual([wrong.status, wrong.continued], [415, false])
  assert.equal((await counts()).counters['hello'], before)
})

test('a tenant without tokens is not told when to come again', { skip }, async (t) => {
  const { ask, counts } = await gateway(t, { ...AS_TENANT, LATTICE_TENANT: '8' })
  const body = { messages: MESSAGES, max_tokens: 150, temperature: 0 }
  assert.equal((await ask(body)).status, 200)
  for (const change of [{}, { expects: true }]) {
    const refused = await ask(body, change)
    assert.equal(refused.status, 429, refused.text)
    assert.equal(refused.continued, false)
    // 150 tokens too few, at 10 a second; a request with an unread body is for what it may be.
    const after = Number(refused.headers['retry-after'])
    assert.ok(after >= 1 && after <= 20, `${after} s`)
  }
  const never = await ask({ ...body, messages: [{ role: 'user', content: 'x'.repeat(4000) }] })
  assert.equal(never.status, 400)
  assert.equal(JSON.parse(never.text).error.code, 'context_length_exceeded')
  const { counters } = await counts()
  assert.deepEqual([counters['rate'], counters['too_large']], [2, 1])
})

test('a client that leaves lets the server go on', { skip }, async (t) => {
  const { ask, counts } = await gateway(t)
  const body = { messages: MESSAGES, max_tokens: 3900, temperature: 0, stream: true }
  const left = await ask(body, { leaveAfter: 1 })
  assert.equal(left.status, 200)
  assert.equal((await ask({ ...body, stream: false }, { leaveAfterMs: 300 })).status, 0)
  for (let tries = 0; (await counts()).running > 0; tries++) {
    assert.ok(tries < 100, 'it runs on')
    await sleep(50)
  }
  assert.ok((await counts()).tenants[0]!.sent.tokens < 3900, 'one ran to its end')
})
