// Catches, over HTTP with a real engine thread: a tenant that finds another's prompts in the cache,
// a pinned prefix that is not kept, kept for another, or takes more than it may.

import assert from 'node:assert/strict'
import { test, type TestContext } from 'node:test'
import { EngineClient } from '../src/engine/client.ts'
import type { EngineThreadOptions } from '../src/engine/messages.ts'
import { startServer } from '../src/server/server.ts'
import { lattice } from './cli/lattice.ts'
import { fakeTemplate } from './support/fake-server.ts'
import { fakeTokenizer } from './support/fake-tokenizer.ts'
import { over, post } from './support/http.ts'
import { expectedOutcome, sequenceRequest } from './support/null-engine.ts'

const CONTEXT = 200
/** 4 tokens a page, two layers: a context has 100 pages, 25,600 bytes. */
const KV = { layers: 2, rowBytes: 64, pageBytes: 256 }
const CONTEXT_BYTES = 25_600

async function serve(
  t: TestContext,
  options: Partial<EngineThreadOptions> = {},
  apiKeys: readonly string[] = [],
): Promise<string> {
  const tokenizer = fakeTokenizer()
  const { vocabSize } = tokenizer
  const engine = await EngineClient.start(
    {
      backend: { kind: 'null', vocab: vocabSize, kv: KV },
      contextLength: CONTEXT,
      maxSequences: 4,
      stepTokens: 64,
      kvBytes: 4 * CONTEXT_BYTES,
      prefixCacheBytes: 2 * CONTEXT_BYTES,
      ...options,
    },
    { id: 'null', architecture: 'none', contextLength: CONTEXT, vocabSize },
    { sequences: 100, contextLength: CONTEXT },
  )
  t.after(() => engine.close())
  const host = '127.0.0.1'
  const texts = { tokenizer, template: fakeTemplate }
  const server = await startServer({ engine, ...texts, host, port: 0, apiKeys })
  t.after(() => server.close())
  return server.url
}

const ids = (length: number, first: number) => Array.from({ length }, (_, i) => (first + i) % 200)
const bearer = (key: string) => ({ authorization: `Bearer ${key}` })

interface Asked {
  prompt: number[]
  [parameter: string]: unknown
}

async function cachedTokens(
  url: string,
  body: Asked,
  headers: Record<string, string> = {},
): Promise<number> {
  const answer = await post(over(url), '/v1/completions', { max_tokens: 2, ...body }, headers)
  assert.equal(answer.status, 200, JSON.stringify(answer.json))
  return answer.json.usage.prompt_tokens_details.cached_tokens as number
}

async function pinned(url: string, headers: Record<string, string> = {}): Promise<any[]> {
  const response = await fetch(`${url}/v1/prefixes`, { headers })
  return ((await response.json()) as { data: any[] }).data
}

test("a tenant finds another's prompt in the cache, whatever it says of itself", async (t) => {
  const kvBytes = 20 * CONTEXT_BYTES
  const url = await serve(t, { kvBytes, prefixCacheBytes: kvBytes }, ['one', 'two', 'three'])
  const prompt = ids(100, 1)
  assert.equal(await cachedTokens(url, { prompt }, bearer('one')), 0)
  const disguises: [extra: object, headers: Record<string, string>][] = [
    [{}, {}],
    [{ user: 'one', safety_identifier: 'one', prompt_cache_key: 'one' }, {}],
    [{ user: 'key-one', metadata: { tenant: 'one', cache_salt: 'one' } }, {}],
    [{}, { 'x-tenant': 'one', 'x-api-key': 'one', 'openai-organization': 'one', cookie: 'one' }],
  ]
  // The second key's first request in each guise: a prompt of its own would be found the next time.
  for (const [i, [extra, headers]] of disguises.entries()) {
    const other = [...prompt, i]
    assert.equal(await cachedTokens(url, { prompt: other }, bearer('one')), 100)
    const found = await cachedTokens(
      url,
      { prompt: other, ...extra },
      { ...headers, ...bearer(i % 2 ? 'three' : 'two') },
    )
    assert.equal(found, i < 2 ? 0 : 100, 'only what this key has asked before')
  }
  const first = [7, ...prompt]
  assert.equal(await cachedTokens(url, { prompt: first, user: 'one' }, bearer('one')), 0)
  assert.equal(await cachedTokens(url, { prompt: first, user: 'one' }, bearer('two')), 0)
  assert.equal(await cachedTokens(url, { prompt: first, user: 'else' }, bearer('one')), 100)
})

test('a pinned prefix is lost under pressure, or another key sees it', async (t) => {
  const url = await serve(t, {}, ['one', 'two'])
  const prompt = ids(60, 1)
  const { status, json } = await post(over(url), '/v1/prefixes', { prompt }, bearer('one'))
  assert.equal(status, 201)
  const { id, tokens, pages, bytes, uses, cached_tokens: cached } = json
  assert.deepEqual([tokens, pages, bytes, uses, cached], [60, 30, 30 * 256, 0, 0])
  const again = await post(over(url), '/v1/prefixes', { prompt }, bearer('one'))
  assert.equal(again.json.id, id)
  assert.equal(again.json.cached_tokens, 59)
  // Ten contexts' worth of other prompts pass through a cache of two.
  for (let i = 0; i < 10; i++) await cachedTokens(url, { prompt: ids(190, 3 * i) }, bearer('two'))
  assert.equal(await cachedTokens(url, { prompt: [...prompt, 9] }, bearer('one')), 60)
  assert.equal(await cachedTokens(url, { prompt: [...prompt, 9] }, bearer('two')), 0)
  assert.deepEqual(
    (await pinned(url, bearer('one'))).map((prefix) => [prefix.id, prefix.uses]),
    [[id, 2]],
  )
  assert.deepEqual(await pinned(url, bearer('two')), [])
  const remove = (key: string) =>
    fetch(`${url}/v1/prefixes/${id}`, { method: 'DELETE', headers: bearer(key) })
  assert.equal((await remove('two')).status, 404)
  assert.equal((await remove('one')).status, 200)
  assert.equal((await remove('one')).status, 404)
  assert.deepEqual(await pinned(url, bearer('one')), [])
})

test('what cannot be pinned is pinned in part, or refused without a reason', async (t) => {
  const without = await serve(t, { prefixCacheBytes: 0 })
  const refused = await post(over(without), '/v1/prefixes', { prompt: ids(60, 1) })
  assert.equal(refused.status, 409)
  assert.equal(refused.json.error.code, 'prefix_memory_exhausted')
  assert.match(refused.json.error.message, /--prefix-cache/)
  // Memory for a context and a quarter: 25 pages may be pinned.
  const url = await serve(t, { kvBytes: CONTEXT_BYTES * 1.25 })
  const pin = (body: object) => post(over(url), '/v1/prefixes', body)
  const big = await pin({ prompt: ids(60, 1) })
  assert.equal(big.json.error.code, 'prefix_memory_exhausted')
  assert.equal((await pin({ prompt: ids(30, 1) })).status, 201)
  const second = await pin({ prompt: ids(30, 100) })
  assert.equal(second.status, 409, 'it fits alone, not beside the first')
  assert.equal((await pin({ prompt: ids(40, 1) })).status, 201, 'ten tokens more than the first')
  assert.equal((await pinned(url)).length, 2)
  assert.equal(await cachedTokens(url, { prompt: ids(190, 50), max_tokens: 10 }), 0)
  const wrong: [body: object, status: number, param: string | null][] = [
    [{}, 400, 'prompt'],
    [{ prompt: 'a', messages: [{ role: 'user', content: 'x' }] }, 400, 'prompt'],
    [{ prompt: ['a', 'b'] }, 400, 'prompt'],
    [{ prompt: 'a', tools: [] }, 400, 'tools'],
    [{ prompt: 'a', ttl: 5 }, 400, 'ttl'],
    [{ prompt: 'a', model: 'other' }, 404, 'model'],
    [{ prompt: ids(200, 0) }, 400, null],
  ]
  for (const [body, status, param] of wrong) {
    const answer = await pin(body)
    assert.deepEqual([answer.status, answer.json.error.param], [status, param])
  }
})

test('pinned messages are not what a chat with them begins with', async (t) => {
  const url = await serve(t)
  const system = { role: 'system', content: 'Be brief.' }
  const { json } = await post(over(url), '/v1/prefixes', { messages: [system] })
  const chat = { messages: [system, { role: 'user', content: 'hi' }], max_tokens: 2 }
  const answer = await post(over(url), '/v1/chat/completions', chat)
  assert.equal(answer.json.usage.prompt_tokens_details.cached_tokens, json.tokens)
})

test('with answers cached, the next turn computes the last answer again', async (t) => {
  const prompt = ids(30, 1)
  const request = sequenceRequest({ prompt: Int32Array.from(prompt), maxTokens: 20 })
  const { tokens } = expectedOutcome(request, fakeTokenizer().vocabSize)
  for (const prefixCacheOutput of [false, true]) {
    const url = await serve(t, { prefixCacheOutput })
    const body = { prompt, max_tokens: 20, temperature: 0, ignore_eos: true }
    assert.equal(await cachedTokens(url, body), 0)
    const cached = await cachedTokens(url, { prompt: [...prompt, ...tokens, 1, 2, 3] })
    // The last token was sampled, but nothing has been computed from it.
    assert.equal(cached, prefixCacheOutput ? 30 + 19 : 30)
  }
})

test('lattice prefix pins, lists and unpins', async (t) => {
  const url = await serve(t, {}, ['key'])
  const env = { LATTICE_API_KEY: 'key' }
  const prefix = (args: string[], stdin = '') =>
    lattice(['prefix', ...args, '--url', url], { env, stdin })
  const done = await prefix(['pin', '-'], 'x'.repeat(63))
  assert.equal(done.code, 0, done.stderr)
  const [, id = ''] =
    /^(prefix-\w+): 64 tokens in 8 KiB, 0 of them in memory already\n$/.exec(done.stdout) ?? []
  assert.match((await prefix(['ls'])).stdout, new RegExp(`^PREFIX .*\n${id} +64 +32 +8 KiB +0 `))
  const system = await prefix(['pin', '--system', '--json', '-'], 'Be brief.')
  const [first] = await pinned(url, bearer('key'))
  assert.equal(first.id, id)
  const { stdout } = await prefix(['unpin', id, JSON.parse(system.stdout).id])
  assert.equal(stdout.split('\n').length, 3)
  const twice = await prefix(['unpin', id])
  assert.equal(twice.code, 3)
  assert.match(twice.stderr, /No prefix prefix-/)
  assert.match((await prefix(['pin', '/nowhere.txt'])).stderr, /cannot be read/)
})
