// Catches a protocol that its document does not describe: a client in another language, written
// from docs/protocol.md alone, is answered otherwise than the document says.

import assert from 'node:assert/strict'
import { spawn, spawnSync } from 'node:child_process'
import { text } from 'node:stream/consumers'
import { fileURLToPath } from 'node:url'
import { test } from 'node:test'
import { prefixHashes } from '../../src/net/protocol.ts'
import { sipKey } from '../../src/net/siphash.ts'
import { ip, twoHosts, WITHOUT_ROOT } from './namespaces.ts'

const CLIENT = fileURLToPath(new URL('client.py', import.meta.url))
const PROTOCOL = fileURLToPath(new URL('../../docs/protocol.md', import.meta.url))
const KEYS = [1, 2].map((byte) => new Uint8Array(16).fill(byte)) as [Uint8Array, Uint8Array]
const TENANT = {
  index: 1,
  name: 'one',
  keys: KEYS,
  tokensPerSecond: 1e6,
  burstTokens: 1e6,
  maxRunning: 100,
}
const REPLY = { text: 'Héllo wörld! ', times: 20 }

const noPython =
  spawnSync('python3', ['--version']).status === 0 ? false : 'SKIPPED: python3 is not installed'
const skip = WITHOUT_ROOT || noPython

interface Answer {
  text: string
  tokens: number
  code: number
  outputTokens: number
  promptTokens: number
  cachedTokens: number
  refused?: number
  retryMs?: number
  words?: string[]
}

async function python(command: string, args: string[], asked: object): Promise<Answer> {
  const child = spawn(command, [...args, CLIENT], { stdio: ['pipe', 'pipe', 'inherit'] })
  child.stdin.end(JSON.stringify(asked))
  return JSON.parse(await text(child.stdout)) as Answer
}

test('a vector of the document is not what it says', { skip: noPython }, async () => {
  assert.deepEqual(await python('python3', [], { vectors: PROTOCOL }), { vectors: 6 })
})

test('a prefix has another hash than the document says', { skip: noPython }, async () => {
  const text = 'What a prompt begins with. '.repeat(2500)
  const key = Buffer.from(KEYS[0]).toString('hex')
  for (const length of [1023, 1024, 3100, 16_384, 65_535, 65_536]) {
    const prefixes = text.slice(0, length)
    const { words } = await python('python3', [], { prefixes, key })
    const ours = prefixHashes(sipKey(KEYS[0]), Buffer.from(prefixes))
    assert.deepEqual(words?.map(BigInt), ours, `of ${length} bytes`)
  }
})

test('a client of a stranger is not answered', { skip }, async (t) => {
  const { client, server, remove } = await twoHosts()
  t.after(() => remove())
  await server.call('serve', { interface: 'veth-s', tenants: [TENANT], reply: REPLY, stepMs: 1 })
  const ask = (change: object) => {
    const who = { host: server.address, tenant: 1, key: Buffer.from(KEYS[0]).toString('hex') }
    const argv = ['netns', 'exec', client.namespace, 'python3']
    return python('ip', argv, { ...who, prompt: 'hi', maxTokens: 5000, ...change })
  }
  const whole = REPLY.text.repeat(REPLY.times)
  const other = { keyIndex: 1, key: Buffer.from(KEYS[1]).toString('hex') }
  for (const [bytes, change] of [
    [1, {}],
    [1200, { host: server.address6 }],
    [1201, other],
    [30_000, {}],
    [120_000, { host: server.address6, ...other }],
  ] as const) {
    const answer = await ask({ prompt: 'a'.repeat(bytes), ...change })
    // The fake engine's: a token a byte, and one to begin with.
    assert.equal(answer.text, whole + (bytes + 1), `${bytes} bytes`)
    const tokens = Buffer.byteLength(answer.text)
    assert.deepEqual([answer.code, answer.tokens, answer.outputTokens], [0, tokens, tokens + 1])
    assert.deepEqual([answer.promptTokens, answer.cachedTokens], [bytes + 1, 0])
  }
  const length = await ask({ maxTokens: 7 })
  assert.deepEqual([length.code, length.outputTokens], [1, 7])
  const cancelled = await ask({ cancelAfter: 20 })
  assert.equal(cancelled.code, 2)
  assert.ok(cancelled.text.length < whole.length)
  assert.deepEqual(await ask({ model: 'another' }), { refused: 19, retryMs: 0 })
  assert.deepEqual(await ask({ maxTokens: 1 << 20 }), { refused: 27, retryMs: 0 })
  assert.deepEqual(await ask({ maxTokens: (1 << 20) + 1 }), { refused: 18, retryMs: 0 })
  // Said once the prompt is there.
  for (const change of [
    { temperature: -1 },
    { topP: 1.5 },
    { topP: -0.5 },
    { change: { maxTokens: 0 } },
  ]) {
    assert.equal((await ask(change)).code, 18, JSON.stringify(change))
  }
  assert.equal((await ask({ chat: true, prompt: '[]' })).code, 26)
  const status = await server.call('status')
  assert.deepEqual([status?.running, status?.counters['bad_mac']], [0, 0])
})

test('IPv6 is answered otherwise than IPv4', { skip: WITHOUT_ROOT }, async (t) => {
  const { client, server, remove } = await twoHosts()
  t.after(() => remove())
  await server.call('serve', { interface: 'veth-s', tenants: [TENANT], reply: REPLY })
  const to = { host: server.address6, tenant: 1, key: KEYS[0] }
  // As small as a path may be.
  for (const host of [client, server]) {
    ip('-n', host.namespace, 'link', 'set', host.link, 'mtu', '1344')
  }
  const prompt = 'é'.repeat(50_000)
  const asked = await client.call('ask', to, { prompt, maxTokens: 5000 })
  assert.equal(asked.text, REPLY.text.repeat(REPLY.times) + 100_001)
  const bytes = new Uint8Array(1 << 20).fill(7)
  await server.call('listen', 7411)
  assert.equal((await client.call('transfer', server.address6, 7411, bytes)).length, 64)
})
