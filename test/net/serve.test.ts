// Catches a `lattice serve --net` that does not serve, hides how it is attached, or stays attached;
// a `lattice net` that shows or changes something else; a `lattice run --server` with no answer.

import assert from 'node:assert/strict'
import { once } from 'node:events'
import { spawn } from 'node:child_process'
import { join } from 'node:path'
import { temporaryDirectory } from '../support/temporary.ts'
import { inNamespace } from './namespaces.ts'
import { test } from 'node:test'
import { WITHOUT_ROOT } from './namespaces.ts'
import { tinyLlama, writeTinyGguf } from '../support/tiny-gguf.ts'
import { AS_TENANT, KEY, lattice, MAIN, SEVEN, serving, URL_OF_SERVER } from './serving.ts'

const skip = WITHOUT_ROOT
const ASK = ['run', '--server', 'lattice://10.99.0.2', '--raw', '--max-tokens', '5', 'hello']

test('serve --net does not answer, or stays attached', { skip }, async (t) => {
  const { two, child, said, ended } = await serving(t, {
    flags: ['--net', 'veth-s', '--net-sample', '1'],
  })
  const { server, client } = two
  assert.match(said(), /on veth-s, UDP port 7411: native XDP .*, AF_XDP copy, native ring, queue 0/)
  assert.ok(!said().includes(KEY))
  const [first, again] = [
    await lattice(client.namespace, [...ASK, '--temperature', '0', '--json'], AS_TENANT),
    await lattice(client.namespace, [...ASK, '--temperature', '0'], AS_TENANT),
  ]
  assert.equal(first.code, 0, first.stderr)
  const answer = JSON.parse(first.stdout)
  assert.equal(answer.usage.completion_tokens, 5)
  assert.equal(answer.finish_reason, 'length')
  assert.equal(again.stdout, `${answer.text}\n`)
  const http = await lattice(server.namespace, ['net', 'status', '--json', '--url', URL_OF_SERVER])
  const status = JSON.parse(http.stdout)
  assert.equal(status.counters.granted, 2)
  assert.equal(status.running, 0)
  assert.ok(!http.stdout.includes(KEY))
  assert.deepEqual(status.events, { count: 2, every: 1 })
  const net = (...args: string[]) => {
    return lattice(server.namespace, ['net', ...args, '--url', URL_OF_SERVER])
  }
  const events = (await net('events', '--json')).stdout.trimEnd().split('\n')
  assert.equal(events.length, 2)
  for (const line of events) {
    const { request, name, decision, maxTokens } = JSON.parse(line)
    assert.deepEqual([name, decision, maxTokens], ['seven', 'grant', 5])
    // The same id in the server's log and on the page.
    const words = `granted ${request} of seven: 5 bytes and up to 5 tokens, engine 0\n`
    assert.ok(said().includes(words), said())
    assert.ok((await net('events')).stdout.includes(words))
  }
  child.kill('SIGTERM')
  assert.equal(await ended, 0)
  assert.ok(!server.details().includes('xdp'))
})

test('lattice net does not attach, detach or say why not', { skip }, async (t) => {
  const { two } = await serving(t)
  const net = (...args: string[]) => {
    return lattice(two.server.namespace, ['net', ...args, '--url', URL_OF_SERVER])
  }
  const nothing = await net('status')
  assert.equal(nothing.code, 3)
  assert.match(nothing.stderr, /attached to no interface/)
  assert.match((await net('detach')).stderr, /attached to no interface/)
  assert.match((await net('attach', 'eth9')).stderr, /no interface 'eth9'/)
  assert.match((await net('attach', 'veth-s', '--mode', 'zerocopy')).stderr, /cannot do zerocopy/)
  const how = ['--mode', 'generic', '--port', '9000', '--ring', 'typescript']
  const attached = await net('attach', 'veth-s', ...how)
  assert.equal(attached.code, 0, attached.stderr)
  assert.match(attached.stdout, /veth-s, UDP port 9000: generic XDP .*, ring in TypeScript,/)
  assert.match(two.server.details(), /xdpgeneric/)
  assert.match((await net('attach', 'veth-s')).stderr, /attached to veth-s already/)
  assert.match((await net('events')).stderr, /sampling is off/)
  const asked = ASK.map((word) => (word.startsWith('lattice:') ? `${word}:9000` : word))
  assert.equal((await lattice(two.client.namespace, asked, AS_TENANT)).code, 0)
  const page = (await net('status')).stdout
  assert.match(page, /granted +1\n/)
  assert.match(page, /seven +7 +0 +1 +0/)
  assert.equal((await net('detach')).code, 0)
  assert.ok(!two.server.details().includes('xdp'))
})

test('more connections are let in than flags say', { skip }, async (t) => {
  const flags = ['--host', '0.0.0.0', '--net', 'veth-s', '--net-syn', '0.01:3']
  const { two, said } = await serving(t, { flags })
  assert.match(said(), /TCP port 8099: 0.01 a second of one source, 3 at once/)
  const net = (...args: string[]) => {
    return lattice(two.server.namespace, ['net', ...args, '--url', URL_OF_SERVER])
  }
  const connects = (times: number) => {
    return two.client.call('connects', two.server.address, 8099, times)
  }
  assert.equal(await connects(5), 3)
  const page = (await net('status')).stdout
  assert.match(page, /^syn +\d+\n {2}syn_source +\d+\n/m)
  assert.equal((await net('detach')).code, 0)
  assert.equal(await connects(5), 5)
  const total = await net('attach', 'veth-s', '--syn-total', '0.01:2', '--mode', 'generic')
  assert.match(total.stdout, /TCP port 8099: 0.01 a second of all, 2 at once/)
  assert.equal(await connects(4), 2)
  assert.match((await net('attach', 'veth-s', '--syn', '0:1')).stderr, /Write a rate/)
})

test('limits that nothing would keep are taken in silence', { skip }, async (t) => {
  const paced = { ...SEVEN, priority: 1, bytes_per_second: 100_000 }
  const { two } = await serving(t, { tenants: [paced] })
  const attach = (...args: string[]) => {
    const words = ['net', 'attach', 'veth-s', '--url', URL_OF_SERVER, ...args]
    return lattice(two.server.namespace, words)
  }
  const noFq = await attach()
  assert.equal(noFq.code, 1)
  assert.match(noFq.stderr, /nothing on veth-s holds frames back/)
  assert.match(noFq.stderr, /tc qdisc replace dev veth-s root fq/)
  const loopback = await attach('--syn', '20')
  assert.match(loopback.stderr, /listens on 127.0.0.1, which no interface leads to/)
  assert.ok(!two.server.details().includes('xdp'))
})

test('a server that joins another’s interface is not shown, or not gone', { skip }, async (t) => {
  const path = join(temporaryDirectory('share'), 'socket')
  const { two, said } = await serving(t, { flags: ['--net', 'veth-s', '--net-share', path] })
  const model = writeTinyGguf(tinyLlama())
  const serve = ['serve', '--model', model, '--threads', '1']
  const argv = [MAIN, ...serve, '--port', '8098', '--net-join', path]
  const [command, args] = inNamespace(two.server.namespace, ...argv)
  const child = spawn(command, args, { stdio: ['ignore', 'pipe', 'pipe'] })
  t.after(() => void child.kill('SIGKILL'))
  let text = ''
  child.stdout.on('data', (chunk: Buffer) => (text += String(chunk)))
  while (!text.includes('ready in')) await once(child.stdout, 'data')
  assert.match(text, new RegExp(`Datagrams through the server that shares ${path}`))
  const status = async () => {
    const argvOf = ['net', 'status', '--json', '--url', URL_OF_SERVER]
    return JSON.parse((await lattice(two.server.namespace, argvOf)).stdout)
  }
  const { replicas } = await status()
  assert.equal(replicas.length, 2)
  assert.deepEqual(
    replicas.map(({ ready, process }: { ready: boolean; process: number }) => [ready, process]),
    [
      [true, 0],
      [true, child.pid],
    ],
  )
  const page = await lattice(two.server.namespace, ['net', 'status', '--url', URL_OF_SERVER])
  assert.match(page.stdout, new RegExp(`PROCESS.*\\n(.*\\n)?.* ${child.pid} `))
  child.kill('SIGTERM')
  await once(child, 'exit')
  assert.equal(child.exitCode, 0)
  assert.equal((await status()).replicas.length, 1)
  assert.ok(!said().includes('is gone'), said())
})
