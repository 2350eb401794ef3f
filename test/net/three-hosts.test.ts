// Catches an answer that is lost, wrong or charged to another when clients on two hosts ask one
// server at once, through a router that loses, repeats and reorders, over links of the least MTU.

import assert from 'node:assert/strict'
import { existsSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { test } from 'node:test'
import { ip, threeHosts, WITHOUT_ROOT } from './namespaces.ts'

const skip =
  WITHOUT_ROOT || (existsSync('/dev/net/tun') ? false : 'SKIPPED: this kernel has no TUN devices')
const SEED = Number(process.env['LATTICE_NET_SEED'] ?? 1)
const KEYS = [3, 4].map((byte) => new Uint8Array(16).fill(byte)) as [Uint8Array, Uint8Array]
const BURST = 100_000
const MOST = 12
/** The first is limited by its tokens, which do not come back in time, the second by places. */
const TENANTS = [
  { index: 1, name: 'one', burstTokens: BURST, maxRunning: 1000 },
  { index: 2, name: 'two', burstTokens: 1e9, maxRunning: MOST },
].map((tenant, i) => ({ ...tenant, keys: [KEYS[i]!, KEYS[i]!] as const, tokensPerSecond: 10 }))
const REPLY = { text: 'Héllo wörld! ', times: 30 }
const SIZES = [1, 3000, 20_000, 40_000]
const MAX_TOKENS = 1000

/** What the fake engine answers: a token a byte, and the prompt has one to begin with. */
const answerTo = (bytes: number): string => REPLY.text.repeat(REPLY.times) + (bytes + 1)
/** Tokens that a whole answer takes, its end among them. */
const taken = (bytes: number): number =>
  Math.ceil(bytes / 4) + Buffer.byteLength(answerTo(bytes)) + 1

test(`hosts behind a bad router are answered otherwise (seed ${SEED})`, { skip }, async (t) => {
  const world = { seed: SEED, loss: 0.1, repeats: 0.1, late: 0.2, lateMs: 10 }
  const { clients, server, router, remove } = await threeHosts(world)
  t.after(() => remove())
  await server.call('serve', { interface: server.link, tenants: TENANTS, reply: REPLY })
  const as = (i: number, host: string) => ({ host, tenant: i + 1, key: KEYS[i]! })
  const hosts = ['10.99.0.2', 'fd99:0::2']
  const asked = clients.flatMap((client, i) =>
    hosts.flatMap((host) =>
      SIZES.map(async (size) => {
        const request = { prompt: 'x'.repeat(size), maxTokens: MAX_TOKENS }
        const answer = await client.call('ask', as(i, host), request)
        assert.equal(answer.text, answerTo(size), JSON.stringify({ i, host, size, ...answer }))
      }),
    ),
  )
  await Promise.all(asked)
  const use = async (i: number) => (await server.call('status'))!.tenants[i]!
  for (let tries = 0; (await server.call('status'))!.running > 0; tries++) {
    assert.ok(tries < 100, 'a place is not free after 5 s')
    await sleep(50)
  }
  const each = hosts.length * SIZES.length
  const tokens = hosts.length * SIZES.reduce((sum, size) => sum + taken(size), 0)
  for (const i of [0, 1]) {
    const { granted, rejected, chargedTokens, running } = await use(i)
    assert.deepEqual([granted, rejected, running], [each, 0, 0], 'a repeat is another request')
    assert.equal(chargedTokens, tokens, 'one pays for the other')
  }
  // Each HELLO, GRANT and fragment at least, unless there is another way.
  assert.ok((await router.call('routed')) > 2 * each * 20)

  // All that is left to the first; as many as the second may have.
  const reserve = (i: number, maxTokens: number) => {
    const host = hosts[i]!
    return clients[i]!.call('reserve', as(i, host), 'x'.repeat(8), maxTokens)
  }
  const left = BURST - tokens - 2
  const [first] = await Promise.all([
    reserve(0, left),
    ...Array.from({ length: MOST }, () => reserve(1, MAX_TOKENS)),
  ])
  await assert.rejects(reserve(0, 1000), /rate/)
  await assert.rejects(reserve(1, 1), /tenant_busy/)
  const ends = await clients[0].call('finish', first.id)
  assert.equal(ends.reason, 'stop')
  await Promise.all(Array.from({ length: MOST }, (_, id) => clients[1].call('finish', id)))
  const answer = await clients[1].call('ask', as(1, hosts[0]!), {
    prompt: 'again',
    maxTokens: MAX_TOKENS,
  })
  assert.equal(answer.text, answerTo(5))
  // More than once, where the first answer was lost.
  for (const i of [0, 1]) assert.ok((await use(i)).rejected > 0)

  await server.call('detach')
  assert.ok(!server.details().includes('xdp'), server.details())
  const names = [...clients, server, router].map(({ namespace }) => namespace)
  await remove()
  const there = ip('netns', 'list')
  for (const name of names) assert.ok(!there.includes(name), `${name} is left behind`)
})
