// Catches a granted request that user space does not find where the program entered it, that is
// entered twice, or whose place is not free again.

import assert from 'node:assert/strict'
import { after, test, type TestContext } from 'node:test'
import { Worker } from 'node:worker_threads'
import { frame } from '../../test/support/packets.ts'
import { Ingress } from './ingress.ts'
import { CONTROL } from './ingress-maps.ts'
import { HEADER_BYTES, MESSAGE_CODES, MESSAGE_TYPES, readHeader, writeHeader } from './protocol.ts'
import { sipKey } from './siphash.ts'

const skip = process.getuid?.() === 0 ? false : 'SKIPPED: loading BPF programs needs root'
const KEY = new Uint8Array(16).fill(5)
const SIP_KEY = sipKey(KEY)
const TENANTS = [3, 1023]
/** ⌈100 / 4⌉ + 10. */
const COST = 35
const LIMITS = { tokensPerSecond: 10, burstTokens: 1e9, maxRunning: 1e6 }
const ANSWER_AT = 42

const opened: Ingress[] = []
after(() => opened.forEach((ingress) => ingress.close()))

function open(requests: number): Ingress {
  const ingress = Ingress.load({ requests })
  opened.push(ingress)
  ingress.setMaxRunning(1e6)
  ingress.setReplica(0, 'model')
  for (const tenant of TENANTS) ingress.setTenant(tenant, { keys: [KEY, KEY], ...LIMITS })
  return ingress
}

function hello(tenant: number, request: bigint): Uint8Array {
  const bytes = new Uint8Array(HEADER_BYTES)
  const asked = { tenant, request, promptBytes: 100, maxTokens: 10, fragments: 1 }
  const timeUs = BigInt(Date.now()) * 1000n
  const view = new DataView(bytes.buffer)
  writeHeader(view, { type: MESSAGE_TYPES.hello, timeUs, ...asked }, SIP_KEY)
  return frame(bytes)
}

function code(ingress: Ingress, tenant: number, request: bigint): number | undefined {
  const { packet } = ingress.program.testRun(hello(tenant, request))
  return readHeader(new DataView(packet.buffer, ANSWER_AT, HEADER_BYTES), SIP_KEY)?.code
}

/** Numbers as clients draw them, the same each time. */
const numbers = (count: number): bigint[] =>
  Array.from({ length: count }, (_, i) => BigInt.asUintN(64, BigInt(i) * 0x2545_f491_4f6c_dd1dn))

test('a request is lost in the table, or found where it is not', { skip }, () => {
  const each = 2000
  const ingress = open(each * TENANTS.length)
  const all = TENANTS.flatMap((tenant) =>
    numbers(each).map((request) => [tenant, request] as const),
  )
  for (const [tenant, request] of all) assert.equal(code(ingress, tenant, request), 0)
  assert.equal(code(ingress, 3, 1n), MESSAGE_CODES.busy, 'more than was said are remembered')
  for (const [tenant, request] of all) assert.equal(code(ingress, tenant, request), 0)
  assert.equal(ingress.counters()['repeated'], all.length)
  assert.ok(!ingress.finish(3, 1n, 0) && !ingress.finish(4, 0n, 0))
  for (const [tenant, request] of all) assert.ok(ingress.finish(tenant, request, COST))
  for (const [tenant, request] of all) assert.ok(!ingress.finish(tenant, request, COST))
  assert.equal(code(ingress, 3, numbers(2)[1]!), MESSAGE_CODES.request_reused)
  const later = process.hrtime.bigint() + 61_000_000_000n
  const forgotten = [0, 1, 2].map(() => ingress.expire(() => true, later, 3))
  assert.equal(forgotten[0]! + forgotten[1]! + forgotten[2]!, all.length)
  for (const [tenant, request] of all) assert.equal(code(ingress, tenant, request), 0)
})

test('a full bucket refuses although the next has room, or is searched for ever', { skip }, () => {
  // So few that all have the same first bucket; of four with fourteen places each.
  const ingress = open(8)
  const control = new DataView(ingress.object.map('controls').view())
  control.setUint32(CONTROL.rememberedMax, 1000, true)
  const all = numbers(57)
  for (const request of all.slice(0, 56)) assert.equal(code(ingress, 3, request), 0)
  assert.equal(code(ingress, 3, all[56]!), MESSAGE_CODES.busy)
  assert.deepEqual(
    [ingress.running, ingress.use(3).running, ingress.use(3).chargedTokens],
    [56, 56, 56 * COST],
    'who is refused for want of a slot keeps something',
  )
  assert.equal(control.getUint32(CONTROL.remembered, true), 56)
  // One in each bucket makes way.
  const later = process.hrtime.bigint() + 61_000_000_000n
  const some = [0, 20, 30, 55].map((i) => all[i]!)
  for (const request of some) assert.ok(ingress.finish(3, request, COST))
  assert.equal(
    ingress.expire(() => true, later),
    4,
  )
  for (const request of all.slice(0, 56)) {
    assert.equal(ingress.finish(3, request, COST), !some.includes(request))
  }
  for (const request of some) assert.equal(code(ingress, 3, request), 0)
  assert.equal(code(ingress, 3, all[56]!), MESSAGE_CODES.busy)
})

/** Gives the program each packet twice, by two threads at once; resolves when all are through. */
async function atOnce(t: TestContext, ingress: Ingress, packets: Uint8Array[]): Promise<void> {
  const gate = new Int32Array(new SharedArrayBuffer(4))
  const source = new URL('../../test/net/at-once.ts', import.meta.url)
  const workerData = { fd: ingress.program.fd, packets, gate }
  const workers = [0, 1].map(() => new Worker(source, { workerData }))
  t.after(() => Promise.all(workers.map((worker) => worker.terminate())))
  await Promise.all(
    workers.map((worker) => {
      return new Promise((resolve, reject) => worker.on('exit', resolve).on('error', reject))
    }),
  )
}

test('a request that comes in on two CPUs at once is granted twice', { skip }, async (t) => {
  const count = 2000
  const ingress = open(count)
  const packets = numbers(count).map((request) => hello(3, request))
  await atOnce(t, ingress, packets)
  const { hello: asked, granted, repeated, busy } = ingress.counters()
  t.diagnostic(`${busy} of ${count} were being entered by the other CPU`)
  assert.deepEqual([asked, granted, repeated! + busy!], [2 * count, count, count])
  const { running, chargedTokens } = ingress.use(3)
  assert.deepEqual([running, chargedTokens, ingress.running], [count, count * COST, count])
  for (const request of numbers(count)) {
    assert.ok(ingress.finish(3, request, COST))
    assert.ok(!ingress.finish(3, request, COST), 'it is in the table twice')
  }
})

test('a place is lost when requests come and are forgotten at once', { skip }, async (t) => {
  // Few, so that the same slots are taken again and again; the numbers too, when they are free.
  const [room, rounds] = [40, 100]
  const ingress = open(room)
  const some = numbers(room)
  const packets = some.map((request) => hello(3, request))
  const all = Array.from({ length: rounds }, () => packets).flat()
  const later = process.hrtime.bigint() + 600_000_000_000n
  let [finished, forgotten, isOver] = [0, 0, false]
  const sent = atOnce(t, ingress, all).then(() => (isOver = true))
  while (!isOver) {
    for (const request of some) if (ingress.finish(3, request, COST)) finished++
    forgotten += ingress.expire(() => true, later)
    await new Promise((resolve) => setImmediate(resolve))
  }
  await sent
  const { granted } = ingress.counters()
  const control = new DataView(ingress.object.map('controls').view())
  t.diagnostic(`${granted} granted, ${forgotten} forgotten meanwhile`)
  for (const request of some) {
    if (ingress.finish(3, request, COST)) finished++
    assert.ok(!ingress.finish(3, request, COST), 'it is in the table twice')
  }
  forgotten += ingress.expire(() => true, later)
  assert.deepEqual([finished, forgotten], [granted, granted])
  const { running, chargedTokens } = ingress.use(3)
  assert.deepEqual([running, ingress.running, chargedTokens], [0, 0, granted! * COST])
  assert.equal(control.getUint32(CONTROL.remembered, true), 0)
  for (const request of some) assert.equal(code(ingress, 3, request), 0)
})
