// Catches what attaching leaves behind: links, descriptors, mappings; and what it takes over.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { closeFd } from '../../src/ffi/libc.ts'
import { openById } from '../../src/ffi/bpf-objects.ts'
import { Host, ip, twoHosts, WITHOUT_ROOT } from './namespaces.ts'

const skip = WITHOUT_ROOT
const KEY = new Uint8Array(16).fill(3)
const LIMITS = { tokensPerSecond: 1e6, burstTokens: 1e9, maxRunning: 100 }
const TENANTS = [{ index: 1, name: 'one', keys: [KEY, KEY] as const, ...LIMITS }]
const REPLY = { text: 'hi', times: 1 }

test('attaching a thousand times leaves something behind', { skip }, async (t) => {
  const { server, remove } = await twoHosts()
  t.after(() => remove())
  const { before, after } = await server.call('cycle', 'veth-s', 1000)
  t.diagnostic(JSON.stringify(after))
  assert.deepEqual(after, before)
  assert.ok(!server.details().includes('xdp'), server.details())
})

test('serving and stopping leaves something behind', { skip }, async (t) => {
  const { server, remove } = await twoHosts(2)
  t.after(() => remove())
  const { before, after } = await server.call('cycleServing', TENANTS, 'veth-s', 12)
  t.diagnostic(JSON.stringify(after))
  assert.deepEqual(after, before)
  assert.ok(!server.details().includes('xdp'), server.details())
})

test('a killed process leaves a program, a map or a socket', { skip }, async (t) => {
  const { server, remove } = await twoHosts()
  const { namespace, link, address } = server
  let host = server
  t.after(() => host.end().then(remove))
  const programs: number[] = []
  for (let round = 0; round < 4; round++) {
    // What was left behind, a program or who has the queue, would be in the way.
    const status = await host.call('serve', { interface: link, tenants: TENANTS, reply: REPLY })
    assert.equal(await host.call('accountants', link), 1)
    programs.push(status.attached!.id)
    await host.end('SIGKILL')
    host = new Host(namespace, link, address)
    // The kernel takes them away a moment after its last user has gone.
    for (let tries = 0; host.details().includes('xdp'); tries++) {
      assert.ok(tries < 100, 'the program is still attached after 5 s')
      await sleep(50)
    }
    assert.equal(await host.call('accountants', link), 0)
  }
  for (let tries = 0; programs.some((id) => programExists(id)); tries++) {
    assert.ok(tries < 100, 'a program is still there after 5 s')
    await sleep(50)
  }
})

test('of two that attach at once both succeed, or none', { skip }, async (t) => {
  const { server, remove } = await twoHosts()
  const { namespace, link, address } = server
  const second = new Host(namespace, link, address)
  t.after(() => second.end().then(remove))
  for (let round = 0; round < 2; round++) {
    const serve = (host: Host) =>
      host.call('serve', { interface: link, tenants: TENANTS, reply: REPLY })
    const outcomes = await Promise.allSettled([serve(server), serve(second)])
    const winners = outcomes.filter(({ status }) => status === 'fulfilled')
    assert.equal(winners.length, 1, JSON.stringify(outcomes))
    const lost = outcomes.find((outcome) => outcome.status === 'rejected')
    assert.match(String(lost?.reason), /Another XDP program is attached|has this queue/)
    assert.equal(await server.call('accountants', link), 1)
    await Promise.all([server, second].map((host) => host.call('detach')))
    assert.ok(!server.details().includes('xdp'))
  }
})

function programExists(id: number): boolean {
  try {
    closeFd(openById('program', id))
    return true
  } catch {
    return false
  }
}

test('an interface that vanishes takes the server with it', { skip }, async (t) => {
  const { client, server, remove } = await twoHosts()
  t.after(() => remove())
  const options = { interface: 'veth-s', tenants: TENANTS, reply: REPLY }
  await server.call('serve', options)
  ip('-n', server.namespace, 'link', 'del', 'veth-s')
  await server.call('sync')
  const status = await server.call('status')
  assert.equal(status?.attached, undefined)
  const before = await server.call('cpuUs')
  await sleep(500)
  const busyUs = (await server.call('cpuUs')) - before
  assert.ok(busyUs < 250_000, `${busyUs} µs of 500,000 are spent on nothing`)
  await server.call('detach')
  await assert.rejects(server.call('serve', options), /no interface 'veth-s'/)
  const peer = ['peer', 'veth-s', 'netns', server.namespace]
  ip('link', 'add', 'veth-c', 'netns', client.namespace, 'type', 'veth', ...peer)
  ip('-n', server.namespace, 'link', 'set', 'veth-s', 'up')
  assert.equal((await server.call('serve', options)).attached?.mode, 'native')
})

test('another program is replaced, or a wrong interface is taken', { skip }, async (t) => {
  const { client, server, remove } = await twoHosts()
  t.after(() => remove())
  const serve = (name: string, change: object = {}) =>
    server.call('serve', { interface: name, tenants: TENANTS, reply: REPLY, ...change })
  const taken = { interface: 'veth-c', tenants: TENANTS, reply: REPLY }
  await assert.rejects(client.call('serve', taken), /program \d+, "pass", native/)
  assert.match(client.details(), /prog\/xdp/)
  await assert.rejects(serve('eth9'), /no interface 'eth9'/)
  await assert.rejects(serve('veth-s', { mode: 'zerocopy' }), /veth-s cannot do zerocopy/)
  await assert.rejects(serve('lo'), /lo cannot do native/)
  ip('-n', server.namespace, 'link', 'set', 'veth-s', 'mtu', '1343')
  await assert.rejects(serve('veth-s'), /MTU of 1343 bytes; .* need 1344/)
  ip('-n', server.namespace, 'link', 'set', 'veth-s', 'mtu', '1500')
  assert.ok(!server.details().includes('xdp'), 'a refused attachment leaves the program')
  ip('-n', server.namespace, '-6', 'route', 'add', 'default', 'via', client.address6)
  await assert.rejects(serve('veth-s'), /default route leads through veth-s/)
  ip('-n', server.namespace, '-6', 'route', 'del', 'default')
  server.route('default', 'via', '10.99.0.1')
  await assert.rejects(serve('veth-s'), /default route leads through veth-s/)
  assert.equal((await serve('veth-s', { force: true })).attached?.mode, 'native')
  await assert.rejects(serve('veth-s', { force: true }), /already/)
})

test('a downgrade is not said, or is made without being allowed', { skip }, async (t) => {
  const { server, remove } = await twoHosts()
  t.after(() => remove())
  const options = { interface: 'veth-s', tenants: TENANTS, reply: REPLY, allowGeneric: true }
  const status = await server.call('serve', { ...options, mode: 'zerocopy' })
  assert.equal(status.attached?.mode, 'native')
  assert.equal(status.zeroCopy, false)
  assert.match(server.details(), /prog\/xdp/)
})
