// Catches, over HTTP with a real engine thread: a session that is not listed where it is, is shown
// to another key, or is moved and then computed again.

import assert from 'node:assert/strict'
import { setTimeout as sleep } from 'node:timers/promises'
import { test, type TestContext } from 'node:test'
import { EngineClient } from '../src/engine/client.ts'
import { startServer } from '../src/server/server.ts'
import { lattice } from './cli/lattice.ts'
import { fakeTemplate } from './support/fake-server.ts'
import { fakeTokenizer } from './support/fake-tokenizer.ts'
import { over, post } from './support/http.ts'

const CONTEXT = 200
/** 4 tokens a page, two layers. */
const KV = { layers: 2, rowBytes: 64, pageBytes: 256 }

async function serve(t: TestContext, tierColumns: number): Promise<string> {
  const tokenizer = fakeTokenizer()
  const { vocabSize } = tokenizer
  const engine = await EngineClient.start(
    {
      backend: { kind: 'null', vocab: vocabSize, kv: KV, tierColumns },
      contextLength: CONTEXT,
      maxSequences: 4,
      stepTokens: 64,
      kvBytes: 1 << 20,
      prefixCacheBytes: 1 << 19,
    },
    { id: 'null', architecture: 'none', contextLength: CONTEXT, vocabSize },
    { sequences: 100, contextLength: CONTEXT },
  )
  t.after(() => engine.close())
  const texts = { tokenizer, template: fakeTemplate }
  const apiKeys = ['one', 'two']
  const server = await startServer({ engine, ...texts, host: '127.0.0.1', port: 0, apiKeys })
  t.after(() => server.close())
  return server.url
}

const bearer = (key: string) => ({ authorization: `Bearer ${key}` })

async function cached(url: string, prompt: number[]): Promise<number> {
  const body = { prompt, max_tokens: 2 }
  const answer = await post(over(url), '/v1/completions', body, bearer('one'))
  assert.equal(answer.status, 200, JSON.stringify(answer.json))
  return answer.json.usage.prompt_tokens_details.cached_tokens as number
}

interface Session {
  id: string
  where: string
  tokens: number
  pages: number
  offloaded_pages: number
}

async function sessions(url: string, key = 'one'): Promise<Session[]> {
  const response = await fetch(`${url}/v1/sessions`, { headers: bearer(key) })
  return ((await response.json()) as { data: Session[] }).data
}

/** Waits for what the engine has begun. */
async function until(url: string, where: string): Promise<Session> {
  for (;;) {
    const [session] = await sessions(url)
    if (session?.where === where) return session
    await sleep(5)
  }
}

const move = (url: string, id: string, how: string, key = 'one') =>
  post(over(url), `/v1/sessions/${id}/${how}`, {}, bearer(key))

test('a session is moved for another key, or computed again when it was only moved', async (t) => {
  const url = await serve(t, 1000)
  const prompt = Array.from({ length: 100 }, (_, i) => (i * 7) % 200)
  assert.equal(await cached(url, prompt), 0)
  const [session] = await sessions(url)
  assert.deepEqual([session?.where, session?.tokens, session?.pages], ['memory', 100, 50])
  const { id } = session!
  assert.deepEqual(await sessions(url, 'two'), [])
  assert.equal((await move(url, id, 'offload', 'two')).status, 404)
  const moved = await move(url, id, 'offload')
  assert.ok([200, 202].includes(moved.status), JSON.stringify(moved.json))
  const out = await until(url, 'disk')
  assert.deepEqual([out.id, out.pages, out.offloaded_pages], [id, 0, 50])
  assert.equal(await cached(url, prompt), 99)
  assert.equal((await until(url, 'memory')).id, id)
  // By its command, and back by its own; what is there already is said to be.
  const options = ['--url', url, '--api-key', 'one']
  assert.match((await lattice(['offload', id, ...options])).stdout, /is on (its way to )?disk/)
  await until(url, 'disk')
  assert.match(
    (await lattice(['ps', '--sessions', ...options])).stdout,
    /session-\w{16} +disk +100/,
  )
  assert.match((await lattice(['reload', id, ...options])).stdout, /is (in|on its way to) memory/)
  await until(url, 'memory')
  assert.match((await lattice(['reload', id, ...options])).stdout, /is in memory/)
  assert.equal(await cached(url, prompt), 99)
})

test('a session is said to go where it cannot', async (t) => {
  const url = await serve(t, 0)
  await cached(url, [1, 2, 3, 4, 5])
  const [session] = await sessions(url)
  const refused = await move(url, session!.id, 'offload')
  assert.equal(refused.status, 400)
  assert.match(refused.json.error.message, /nowhere/)
  assert.equal((await move(url, 'session-0', 'reload')).status, 404)
})
