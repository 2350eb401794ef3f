// Catches engines that join an interface's owner and get no requests, answer for others, or whose
// death leaves something behind: an index, a prefix, a request that hangs.

import assert from 'node:assert/strict'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { test, type TestContext } from 'node:test'
import { temporaryDirectory } from '../support/temporary.ts'
import type { EngineChoice, ServeOptions } from './host.ts'
import { Host, type TwoHosts, twoHosts, WITHOUT_ROOT } from './namespaces.ts'

const skip = WITHOUT_ROOT
const KEY = new Uint8Array(16).fill(3)
const LIMITS = { tokensPerSecond: 1e6, burstTokens: 1e9, maxRunning: 100 }
const TENANTS = [{ index: 1, name: 'one', keys: [KEY, KEY] as const, ...LIMITS }]
const CLIENT = { host: '10.99.0.2', tenant: 1, key: KEY }

interface Many extends TwoHosts {
  path: string
  /** Another engine, which answers with this text. */
  join(text: string, choice?: Partial<EngineChoice>): Promise<Host>
}

/** An owner whose own engine says 'own '. */
async function many(t: TestContext, options: Partial<ServeOptions> = {}): Promise<Many> {
  const two = await twoHosts()
  const others: Host[] = []
  t.after(async () => {
    await Promise.all(others.map((host) => host.end()))
    await two.remove()
  })
  const path = join(temporaryDirectory('join'), 'socket')
  const reply = { text: 'own ', times: 1 }
  const serve = { interface: 'veth-s', tenants: TENANTS, reply, share: path, ...options }
  await two.server.call('serve', serve)
  return {
    ...two,
    path,
    async join(text, choice = {}) {
      const host = new Host(two.server.namespace, 'veth-s', two.server.address)
      others.push(host)
      await host.call('join', path, { reply: { text, times: 1 }, ...choice })
      return host
    },
  }
}

/** As if the owner had so much to do, or one that joined; waits until the program knows. */
async function load(hosts: Many, index: number, host: Host, requests: number): Promise<void> {
  await host.call('setOtherLoad', requests)
  await until(async () => {
    const status = await hosts.server.call('status')
    return status?.replicas[index]?.others === requests
  })
}

const ask = ({ client }: Many, prompt = 'hello') =>
  client.call('ask', CLIENT, { prompt, maxTokens: 5000 })

test('an engine that joined gets no requests, or another gets its answers', { skip }, async (t) => {
  // Slow, so that the first is not done when the last is asked.
  const choice = (text: string) => ({ stepMs: 50, reply: { text, times: 3 } })
  const hosts = await many(t, choice('own '))
  await hosts.join('first ', choice('first '))
  await hosts.join('second ', choice('second '))
  const sizes = Array.from({ length: 12 }, (_, i) => 100 + 5000 * i)
  const asked = await Promise.all(sizes.map((size) => ask(hosts, 'x'.repeat(size))))
  const counts = new Map<string, number>()
  asked.forEach(({ text, reason, usage }, i) => {
    const [, who = '', rest] = /^(\w+) (?:\1 ){2}(\d+)$/.exec(text) ?? []
    assert.equal(rest, `${sizes[i]! + 1}`, text)
    assert.equal(reason, 'stop')
    assert.equal(usage?.promptTokens, sizes[i]! + 1)
    counts.set(who, (counts.get(who) ?? 0) + 1)
  })
  for (const who of ['own', 'first', 'second']) assert.ok((counts.get(who) ?? 0) > 1, `${who}`)
  // A place is free once the client's last acknowledgement has come.
  await until(async () => {
    const replicas = (await hosts.server.call('status'))?.replicas ?? []
    return replicas.length === 3 && replicas.every(({ running, ready }) => running === 0 && ready)
  })
})

test('a killed engine leaves its index, its prefixes or its requests', { skip }, async (t) => {
  const hosts = await many(t, { prefixCacheBytes: 1 << 20 })
  const replicas = async () => (await hosts.server.call('status'))?.replicas ?? []
  const second = await hosts.join('slow', { stepMs: 20, reply: { text: 'x', times: 5000 } })
  const pid = await second.call('pid')
  assert.equal((await replicas())[1]?.process, pid)
  await load(hosts, 0, hosts.server, 50)
  const asking = Array.from({ length: 4 }, () => ask(hosts, 'y'.repeat(3000)))
  await until(async () => (await second.call('engine')).running === 4)
  await until(async () => (await hosts.client.call('hearing')) === 4)
  await second.end('SIGKILL')
  const codes = (await Promise.all(asking)).map(({ error, code }) => `${error} ${String(code)}`)
  assert.deepEqual(codes, Array(4).fill('request_rejected replica_lost'))
  await until(async () => (await replicas()).length === 1)
  await until(async () => {
    const status = await hosts.server.call('status')
    return status?.running === 0 && status.tenants[0]?.running === 0
  })
  const third = await hosts.join('third ')
  const more = await Promise.all(Array.from({ length: 6 }, () => ask(hosts, 'z'.repeat(20))))
  assert.ok(
    more.some(({ text }) => text === 'third 21'),
    JSON.stringify(more),
  )
  assert.equal((await replicas())[1]?.process, await third.call('pid'))
})

test('a request is lost with an engine that had said nothing', { skip }, async (t) => {
  const hosts = await many(t)
  const other = await hosts.join('never', { stepMs: 600_000 })
  await load(hosts, 0, hosts.server, 50)
  const asking = ask(hosts)
  await until(async () => (await other.call('engine')).asked === 1)
  await other.end('SIGKILL')
  assert.equal((await asking).text, 'own 6')
})

test('prefixes of an engine that joined are not published, or outlive it', { skip }, async (t) => {
  const hosts = await many(t, { prefixCacheBytes: 1 << 20 })
  const other = await hosts.join('', { prefixCacheBytes: 1 << 20 })
  const prefixes = async () =>
    (await hosts.server.call('status'))?.replicas.map((replica) => replica.prefixes)
  const first = (letter: string) =>
    hosts.client.call('ask', CLIENT, { prompt: letter.repeat(5000), maxTokens: 2 })
  await load(hosts, 0, hosts.server, 50)
  await Promise.all(['a', 'b'].map(first))
  await load(hosts, 0, hosts.server, 0)
  await load(hosts, 1, other, 50)
  await Promise.all(['c', 'd'].map(first))
  await load(hosts, 1, other, 0)
  // 1, 1.5, 2, 3 and 4 KiB of each.
  await until(async () => (await prefixes())?.join() === '10,10')
  // The next turn of each chat goes where its first was.
  for (const letter of ['a', 'b', 'c', 'd']) {
    const prompt = letter.repeat(5000) + '!'.repeat(100)
    const { usage } = await hosts.client.call('ask', CLIENT, { prompt, maxTokens: 2 })
    assert.ok((usage?.cachedTokens ?? 0) > 4900, `${letter}: ${JSON.stringify(usage)}`)
  }
  await other.end('SIGKILL')
  await until(async () => (await prefixes())?.join() === '10')
})

test('what an engine has to do over HTTP does not count', { skip }, async (t) => {
  const hosts = await many(t)
  const busy = await hosts.join('busy ')
  await hosts.join('idle ')
  await load(hosts, 1, busy, 50)
  const asked = await Promise.all(Array.from({ length: 10 }, () => ask(hosts)))
  assert.ok(!asked.some(({ text }) => text.startsWith('busy')), JSON.stringify(asked))
})

test('an abort does not reach an engine that joined', { skip }, async (t) => {
  const reply = { text: 'x', times: 100_000 }
  const hosts = await many(t, { stepMs: 5, reply })
  const other = await hosts.join('', { stepMs: 5, reply })
  await load(hosts, 0, hosts.server, 50)
  const request = { prompt: 'hi', maxTokens: 50_000 }
  assert.equal((await hosts.client.call('ask', CLIENT, request, 20)).reason, 'abort')
  await until(async () => (await other.call('engine')).running === 0)
  assert.equal((await other.call('engine')).aborts, 1)
})

test('an owner that ends cuts off what others answer, or they do', { skip }, async (t) => {
  const choice = { stepMs: 10, reply: { text: 'word ', times: 40 } }
  const hosts = await many(t, choice)
  await hosts.join('', choice).then((first) => load(hosts, 1, first, 50))
  const other = await hosts.join('', choice)
  await load(hosts, 0, hosts.server, 50)
  const whole = `${'word '.repeat(40)}6`
  const asked = (host: Host) => until(async () => (await host.call('engine')).asked === 1)
  const first = ask(hosts)
  await asked(other)
  // It leaves, and what it runs is answered.
  const leaving = other.call('stop')
  assert.equal((await first).text, whole)
  await leaving
  await until(async () => (await hosts.server.call('status'))?.replicas.length === 2)
  const third = await hosts.join('', choice)
  const second = ask(hosts)
  await asked(third)
  const ending = hosts.server.call('stop')
  assert.equal((await second).text, whole)
  await ending
})

test('an owner that comes back is not joined again', { skip }, async (t) => {
  const hosts = await many(t)
  const other = await hosts.join('other ', { stepMs: 20, reply: { text: 'x', times: 5000 } })
  await load(hosts, 0, hosts.server, 50)
  const asking = ask(hosts)
  await until(async () => (await other.call('engine')).running === 1)
  await hosts.server.end('SIGKILL')
  await until(async () => (await other.call('engine')).running === 0)
  assert.equal((await asking).error, 'server_unreachable')
  const again = new Host(hosts.server.namespace, 'veth-s', hosts.server.address)
  t.after(() => again.end())
  const serve = { interface: 'veth-s', tenants: TENANTS, reply: { text: 'own', times: 1 } }
  await again.call('serve', { ...serve, share: hosts.path })
  await until(async () => (await again.call('status'))?.replicas.length === 2)
})

async function until(holds: () => Promise<boolean>, mostMs = 20_000): Promise<void> {
  const end = performance.now() + mostMs
  while (!(await holds())) {
    assert.ok(performance.now() < end, `not within ${mostMs} ms`)
    await sleep(50)
  }
}
