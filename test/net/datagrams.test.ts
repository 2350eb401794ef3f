// Catches a request that is lost, answered wrongly or charged wrongly on its way through driver,
// ring and engine and back, over good networks and bad ones.

import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { test, type TestContext } from 'node:test'
import { NET_RINGS, type NetRing } from '../../src/net/ring-choice.ts'
import { without } from '../support/intakes.ts'
import type { ServeOptions } from './host.ts'
import { Host, ip, type TwoHosts, twoHosts, WITHOUT_ROOT } from './namespaces.ts'

const skip = WITHOUT_ROOT
const KEY = new Uint8Array(16).fill(3)
const TENANT = {
  index: 1,
  name: 'one',
  keys: [KEY, KEY] as const,
  tokensPerSecond: 1e6,
  burstTokens: 1e9,
  maxRunning: 100,
}
const REPLY = { text: 'Héllo wörld! ', times: 100 }
const SERVER = '10.99.0.2'
const CLIENT = { host: SERVER, tenant: 1, key: KEY }

async function hosts(t: TestContext, options: Partial<ServeOptions> = {}): Promise<TwoHosts> {
  const two = await twoHosts()
  t.after(() => two.remove())
  const status = await two.server.call('serve', {
    interface: 'veth-s',
    tenants: [TENANT],
    reply: REPLY,
    ...options,
  })
  assert.equal(status.attached?.mode, options.mode ?? 'native')
  assert.equal(status.ring.ring, options.ring ?? 'native')
  return two
}

/** With each of the two that put prompts together. */
function testBoth(name: string, body: (t: TestContext, ring: NetRing) => Promise<void>): void {
  for (const ring of NET_RINGS) {
    test(`${ring}: ${name}`, { skip: skip || without(ring) }, (t) => body(t, ring))
  }
}

/** What the fake engine answers to a prompt of so many bytes: a token a byte, and a begin token. */
function answerTo(bytes: number): string {
  return REPLY.text.repeat(REPLY.times) + (bytes + 1)
}

testBoth('an answer is not the engine’s, or usage is not what was used', async (t, ring) => {
  const { client, server } = await hosts(t, { ring })
  for (const size of [1, 1199, 1200, 1201, 100_000]) {
    const asked = await client.call('ask', CLIENT, { prompt: 'a'.repeat(size), maxTokens: 5000 })
    assert.equal(asked.text, answerTo(size))
    assert.equal(asked.reason, 'stop')
    const outputTokens = Buffer.from(asked.text).length + 1
    assert.deepEqual(asked.usage, { promptTokens: size + 1, cachedTokens: 0, outputTokens })
    assert.equal(asked.tokens, outputTokens - 1)
  }
  const both = await Promise.all(
    Array.from({ length: 20 }, () => {
      return client.call('ask', CLIENT, { prompt: 'x'.repeat(3000), maxTokens: 100 })
    }),
  )
  for (const { text, reason } of both) {
    assert.equal(reason, 'length')
    assert.equal(Buffer.from(text).length, 100)
  }
  await allPlacesAreFree(server)
  assert.equal((await server.call('status'))?.counters['granted'], 25)
})

/** A place is free once the client's last acknowledgement has come. */
async function allPlacesAreFree(server: TwoHosts['server']): Promise<void> {
  await until(async () => {
    const status = await server.call('status')
    return status?.running === 0 && status.tenants[0]?.running === 0
  })
}

testBoth('loss, repeats and disorder reach the text', async (t, ring) => {
  const { client, server } = await hosts(t, { ring })
  for (const seed of [1, 2, 3]) {
    const world = { seed, loss: 0.15, repeats: 0.15, late: 0.2, lateMs: 15 }
    const port = await client.call('relay', world, SERVER, 7411)
    const through = { ...CLIENT, host: '127.0.0.1', port }
    const sizes = [10, 20_000, 90_000]
    const answers = await Promise.all(
      sizes.map((size) => {
        return client.call('ask', through, { prompt: 'é'.repeat(size / 2), maxTokens: 5000 })
      }),
    )
    answers.forEach((asked, i) => {
      assert.equal(asked.text, answerTo(sizes[i]!), `seed ${seed}, ${JSON.stringify(asked)}`)
    })
  }
  await allPlacesAreFree(server)
  const status = await server.call('status')
  assert.equal(status?.tenants[0]?.granted, 9, 'a repeat is another request')
})

testBoth('a network that is bad in one way and one direction reaches the text', async (t, ring) => {
  const { client, server } = await hosts(t, { ring })
  const good = { loss: 0, repeats: 0, late: 0, lateMs: 15 }
  const fates = [{ loss: 0.3 }, { repeats: 0.6 }, { late: 0.5 }]
  const worlds = (['there', 'back'] as const).flatMap((only) =>
    fates.map((fate, i) => ({ ...good, ...fate, only, seed: 10 + i })),
  )
  await Promise.all(
    worlds.map(async (world) => {
      const port = await client.call('relay', world, server.address6, 7411)
      const through = { ...CLIENT, host: '127.0.0.1', port }
      const request = { prompt: 'a'.repeat(40_000), maxTokens: 5000 }
      const asked = await client.call('ask', through, request)
      assert.equal(asked.text, answerTo(40_000), JSON.stringify({ world, ...asked, text: '' }))
    }),
  )
  await allPlacesAreFree(server)
  assert.equal((await server.call('status'))?.tenants[0]?.granted, worlds.length)
})

testBoth('a cancelled request goes on, or keeps its place', async (t, ring) => {
  const { client, server } = await hosts(t, { ring, stepMs: 5 })
  const asked = await client.call('ask', CLIENT, { prompt: 'hi', maxTokens: 5000 }, 20)
  assert.equal(asked.reason, 'abort')
  assert.ok(asked.text.length >= 20 && asked.text.length < 1000, `${asked.text.length}`)
  await until(async () => (await server.call('engine')).running === 0)
  await until(async () => (await server.call('status'))?.running === 0)
  assert.equal((await server.call('engine')).aborts, 1)
})

testBoth('a deadline passes unnoticed', async (t, ring) => {
  const { client, server } = await hosts(t, { ring, stepMs: 50 })
  const request = { prompt: 'hi', maxTokens: 5000, deadlineMs: 400 }
  const asked = await client.call('ask', CLIENT, request)
  assert.equal(asked.code, 'timed_out')
  await until(async () => (await server.call('engine')).running === 0)
})

test('a client that has gone keeps a place for ever', { skip }, async (t) => {
  const { client, server } = await hosts(t, { stepMs: 20 })
  void client.call('ask', CLIENT, { prompt: 'hi', maxTokens: 5000 }).catch(() => {})
  await until(async () => (await server.call('engine')).running === 1)
  await client.end()
  // Meanwhile another, behind a link that is too narrow, waits as long to be told so.
  const narrow = new Host(client.namespace, client.link, client.address)
  t.after(() => narrow.end())
  await narrow.call('pass', client.link)
  ip('-n', client.namespace, 'link', 'set', client.link, 'mtu', '1323')
  const asked = await narrow.call('ask', CLIENT, { prompt: 'x'.repeat(5000), maxTokens: 5 })
  assert.equal(asked.error, 'server_unreachable')
  assert.match(asked.message ?? '', /the prompt does not arrive/)
  await until(async () => (await server.call('status'))?.running === 0, 30_000)
  await until(async () => (await server.call('engine')).running === 0)
})

test('what is wrong is refused without its reason', { skip }, async (t) => {
  const tenants = [
    TENANT,
    { ...TENANT, index: 2, name: 'two', tokensPerSecond: 10, burstTokens: 60 },
  ]
  const { client } = await hosts(t, { tenants })
  const ask = (change: object, request: object = {}) =>
    client.call('ask', { ...CLIENT, ...change }, { prompt: 'hi', maxTokens: 10, ...request })
  const silent = await Promise.all([ask({ key: new Uint8Array(16) }), ask({ tenant: 3 })])
  assert.deepEqual(
    silent.map(({ error }) => error),
    Array(2).fill('server_unreachable'),
  )
  const nowhere = await ask({ host: '10.250.0.1' })
  assert.equal(nowhere.error, 'server_unreachable', JSON.stringify(nowhere))
  assert.match(nowhere.message ?? '', /No way to 10.250.0.1:7411/)
  assert.equal((await ask({}, { model: 'another' })).code, 'model')
  assert.equal((await ask({ tenant: 2 }, { maxTokens: 100 })).code, 'too_large')
  assert.equal((await ask({}, { maxTokens: 1 << 20, prompt: 'x'.repeat(1 << 20) })).code, 'context')
  const chat = await ask({}, { prompt: [{ role: 'user', content: 'hi' }] })
  assert.equal(chat.code, 'prompt', 'this model has no template')
})

test('a killed server leaves a program behind', { skip }, async (t) => {
  const { client, server } = await hosts(t, { stepMs: 20 })
  assert.match(server.details(), /prog\/xdp id \d+/)
  const asking = client.call('ask', CLIENT, { prompt: 'hi', maxTokens: 5000 })
  await until(async () => (await server.call('engine')).running === 1)
  await server.end('SIGKILL')
  await until(async () => !server.details().includes('xdp'))
  assert.equal((await asking).error, 'server_unreachable')
})

test('what is not ours is changed or lost', { skip }, async (t) => {
  const { client, server } = await hosts(t)
  await server.call('listen', 7411)
  const bytes = new Uint8Array(8 << 20).map((_, i) => (i * 2654435761) >>> 24)
  const expected = createHash('sha256').update(bytes).digest('hex')
  const asking = client.call('ask', CLIENT, { prompt: 'x'.repeat(50_000), maxTokens: 5000 })
  assert.equal(await client.call('transfer', SERVER, 7411, bytes), expected)
  assert.equal((await asking).text, answerTo(50_000))
})

test('a prefix in memory is not published, or one that has gone stays', { skip }, async (t) => {
  const { client, server } = await hosts(t, { prefixCacheBytes: 1 << 20 })
  const ask = (prompt: string) => client.call('ask', CLIENT, { prompt, maxTokens: 2 })
  const published = async () => (await server.call('status'))?.replicas[0]?.prefixes
  assert.equal((await ask('short'.repeat(100))).usage?.outputTokens, 2)
  assert.equal(await published(), 0)
  const [first] = [await ask('a'.repeat(5000)), await ask('a'.repeat(5000))]
  assert.equal(first.usage?.cachedTokens, 1, 'the begin token is every prompt’s')
  // 1, 1.5, 2, 3 and 4 KiB.
  await until(async () => (await published()) === 5)
  // The first 1 KiB is the same.
  const { usage } = await ask('a'.repeat(1100) + 'b'.repeat(4000))
  assert.ok((usage?.cachedTokens ?? 0) > 1000, JSON.stringify(usage))
  await until(async () => (await published()) === 9)
  // Each has 160 KiB in a cache of 1 MiB.
  for (const letter of 'cdefghijk') await ask(letter.repeat(5000))
  // All 54 are known first; then it is heard which of them have gone.
  let most = 0
  await until(async () => {
    const held = (await published()) ?? 0
    most = Math.max(most, held)
    return most > 35 && held >= 10 && held <= 35
  })
})

testBoth('a request that comes in on another queue is lost', async (t, ring) => {
  const two = await twoHosts(4)
  t.after(() => two.remove())
  const { client, server } = two
  const options = { interface: server.link, tenants: [TENANT], reply: REPLY, ring }
  assert.deepEqual((await server.call('serve', options)).queues, [0, 1, 2, 3])
  const answers = await Promise.all(
    Array.from({ length: 24 }, () => {
      return client.call('ask', CLIENT, { prompt: 'x'.repeat(3000), maxTokens: 5000 })
    }),
  )
  for (const { text } of answers) assert.equal(text, answerTo(3000))
})

test('an address of a bridge over the interface is not answered for', { skip }, async (t) => {
  const two = await twoHosts()
  t.after(() => two.remove())
  const { client, server } = two
  const link = (...args: string[]) => ip('-n', server.namespace, 'link', ...args)
  try {
    link('add', 'br0', 'type', 'bridge')
  } catch {
    return t.skip('SKIPPED: this kernel has no bridges')
  }
  link('set', server.link, 'master', 'br0')
  link('set', 'br0', 'up')
  ip('-n', server.namespace, 'addr', 'add', '10.99.1.2/24', 'dev', 'br0')
  ip('-n', client.namespace, 'addr', 'add', '10.99.1.1/24', 'dev', client.link)
  const options = { interface: server.link, tenants: [TENANT], reply: REPLY }
  server.route('default', 'via', '10.99.1.1')
  await assert.rejects(server.call('serve', options), /through br0, which is on veth-s/)
  await server.call('serve', { ...options, force: true })
  const to = { ...CLIENT, host: '10.99.1.2' }
  const asked = await client.call('ask', to, { prompt: 'x'.repeat(5000), maxTokens: 5000 })
  assert.equal(asked.text, answerTo(5000), JSON.stringify(asked))
})

test('generic mode serves nothing', { skip }, async (t) => {
  const { client } = await hosts(t, { mode: 'generic' })
  const asked = await client.call('ask', CLIENT, { prompt: 'x'.repeat(5000), maxTokens: 5000 })
  assert.equal(asked.text, answerTo(5000))
})

/** Waits for what comes in its own time; fails with the test’s own limit in mind. */
async function until(holds: () => Promise<boolean>, mostMs = 10_000): Promise<void> {
  const end = performance.now() + mostMs
  while (!(await holds())) {
    assert.ok(performance.now() < end, `not within ${mostMs} ms`)
    await sleep(50)
  }
}
