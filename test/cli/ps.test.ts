// Catches a `lattice ps` that misreads a server, or prints a trace when there is none.

import assert from 'node:assert/strict'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { test, type TestContext } from 'node:test'
import type { EngineSnapshot } from '../../src/engine/api.ts'
import { lattice } from './lattice.ts'

const SNAPSHOT: EngineSnapshot = {
  sequences: [
    {
      id: 1,
      requestId: 'chat-1',
      tenant: 'default',
      state: 'decode',
      promptTokens: 90,
      kvTokens: 100,
      outputTokens: 11,
      pages: 3,
      bytes: 196_608,
      ageMs: 1530,
    },
  ],
  running: 1,
  waiting: 0,
  kv: {
    pageBytes: 65_536,
    usedPages: 3,
    limitPages: 8192,
    residentBytes: 131_072,
    cachedPages: 0,
    pinnedPages: 0,
    prefixLimitPages: 0,
  },
  steps: 11,
  promptTokens: 90,
  outputTokens: 11,
  finished: { stop: 0, length: 0, abort: 0, error: 0 },
  preemptions: 0,
  beamCopies: 0,
  prefixQueries: 0,
  prefixHits: 0,
  prefixEvictions: 0,
  computeMs: 1,
  stepMs: 2,
}

test('requests and totals are in the table', async (t) => {
  const { code, stdout } = await lattice(['ps', '--url', await serve(t, SNAPSHOT)])
  assert.equal(code, 0)
  assert.match(stdout, /chat-1\s+default\s+decode\s+90\s+11\s+100\s+3\s+192 KiB\s+1\.5 s\n/)
  assert.match(stdout, /1 running, 0 waiting · 3 of 8192 pages of 64 KiB used, 192 KiB of 512 MiB/)
  assert.match(stdout, /128 KiB resident/)
})

test('--json is what the server said', async (t) => {
  const { stdout } = await lattice(['ps', '--json', '--url', await serve(t, SNAPSHOT)])
  assert.deepEqual(JSON.parse(stdout), SNAPSHOT)
})

test('an empty list does not say that there is no prefix cache', async (t) => {
  for (const [prefixLimitPages, message] of [
    [0, /no prefix cache: start it with --prefix-cache/],
    [9, /No conversation is cached|Nothing is pinned/],
  ] as const) {
    const kv = { ...SNAPSHOT.kv, prefixLimitPages }
    const url = await serve(t, { ...SNAPSHOT, kv, data: [] })
    assert.match((await lattice(['ps', '--sessions', '--url', url])).stdout, message)
    assert.match((await lattice(['prefix', 'ls', '--url', url])).stdout, message)
  }
})

test('the key reaches the server, and a wrong one is told', async (t) => {
  const url = await serve(t, SNAPSHOT, 'secret')
  assert.equal((await lattice(['ps', '--url', url, '--api-key', 'secret'])).code, 0)
  assert.equal(
    (await lattice(['ps', '--url', url], { env: { LATTICE_API_KEY: 'secret' } })).code,
    0,
  )
  const { code, stderr } = await lattice(['ps', '--url', url])
  assert.equal(code, 1)
  assert.match(stderr, /asks for another API key/)
})

test('no server, and a server of another kind, are told apart', async (t) => {
  const nobody = await lattice(['ps', '--url', 'http://127.0.0.1:9'])
  assert.equal(nobody.code, 1)
  assert.match(nobody.stderr, /No server answers.*\n.*lattice serve/)
  const other = await lattice(['ps', '--url', await serve(t, 'hello')])
  assert.match(other.stderr, /is no Lattice server/)
})

test('a server whose engine is silent is taken for another program', async (t) => {
  const { code, stderr } = await lattice(['ps', '--url', await serve(t, undefined)])
  assert.equal(code, 1)
  assert.match(stderr, /engine that is silent/)
  assert.doesNotMatch(stderr, /no Lattice server/)
})

async function serve(t: TestContext, body: unknown, key?: string): Promise<string> {
  const server = createServer((request, response) => {
    const allowed = key === undefined || request.headers.authorization === `Bearer ${key}`
    const status = body === undefined ? 503 : 200
    response.writeHead(allowed ? status : 401).end(JSON.stringify(body))
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  t.after(() => server.close())
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`
}
