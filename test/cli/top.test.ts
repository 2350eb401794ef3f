// Catches a `lattice top` that shows nothing of a real engine, or hangs where there is no terminal.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { EngineClient } from '../../src/engine/client.ts'
import { startServer } from '../../src/server/server.ts'
import { fakeTokenizer } from '../support/fake-tokenizer.ts'
import { over, post } from '../support/http.ts'
import { lattice } from './lattice.ts'

test('one page of what a server holds goes into a pipe', async (t) => {
  const tokenizer = fakeTokenizer()
  const { vocabSize } = tokenizer
  const kv = { layers: 2, rowBytes: 64, pageBytes: 256 }
  const engine = await EngineClient.start(
    {
      backend: { kind: 'null', vocab: vocabSize, kv },
      contextLength: 200,
      maxSequences: 4,
      stepTokens: 64,
      kvBytes: 1 << 20,
      prefixCacheBytes: 1 << 19,
    },
    { id: 'a-model', architecture: 'none', contextLength: 200, vocabSize },
    { sequences: 100, contextLength: 200 },
  )
  t.after(() => engine.close())
  const host = '127.0.0.1'
  const server = await startServer({ engine, tokenizer, template: undefined, host, port: 0 })
  t.after(() => server.close())
  const prompt = Array.from({ length: 100 }, (_, i) => i)
  const pinned = await post(over(server.url), '/v1/prefixes', { prompt: prompt.slice(0, 40) })
  assert.equal(pinned.status, 201)
  // Two choices fork from each other; the prompt's other 60 tokens are cached.
  const answer = await post(over(server.url), '/v1/completions', { prompt, n: 2 })
  assert.equal(answer.status, 200)
  const { code, stdout, stderr } = await lattice(['top', '--url', server.url])
  assert.equal(code, 0, stderr)
  assert.ok(!stdout.includes('\x1b'))
  assert.match(stdout, /lattice top · a-model/)
  // 40 tokens are 10 columns of two pages, all of it and the rest are 25.
  assert.match(stdout, /◆ pinned 5K  ▒ cached 7.5K /)
  assert.match(stdout, /^ {2}◆{10}▒{15}$/m)
  assert.match(stdout, /HISTORY  all: .*fork 2 /)
  const json = await lattice(['top', '--json', '--url', server.url])
  const { kv: map, engine: snapshot } = JSON.parse(json.stdout)
  assert.equal(map.usedPages, 50)
  assert.equal(snapshot.kv.pinnedPages, 20)
  assert.equal(map.fragmentation, 0)
  assert.deepEqual(
    map.runs.map(({ state, first, end, tier }: Record<string, unknown>) => [
      state,
      first,
      end,
      tier,
    ]),
    [
      ['pinned', 0, 10, 'memory'],
      ['cached', 10, 25, 'memory'],
    ],
  )
  assert.equal(map.totals.fork.bytes, 20 * 256 + 50 * 256, 'what the two forks share')
})

test('no server is told as by every command', async () => {
  const { code, stderr } = await lattice(['top', '--url', 'http://127.0.0.1:9'])
  assert.equal(code, 1)
  assert.match(stderr, /No server answers/)
})
