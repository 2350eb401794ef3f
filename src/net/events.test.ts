// Catches decisions that are told of wrongly, too often or too seldom, or lost without being
// counted.

import assert from 'node:assert/strict'
import { test, type TestContext } from 'node:test'
import { frame } from '../../test/support/packets.ts'
import { describeEvent } from './decisions.ts'
import { NetEvents } from './events.ts'
import { Ingress } from './ingress.ts'
import { fragmentsOf, HEADER_BYTES, MESSAGE_TYPES, writeHeader } from './protocol.ts'
import { sipKey } from './siphash.ts'

const skip = process.getuid?.() === 0 ? false : 'SKIPPED: loading BPF programs needs root'
const KEY = new Uint8Array(16).fill(5)
const TENANT = 9

interface World {
  ingress: Ingress
  /** Asks for room for a prompt of so many bytes. */
  hello(request: bigint, promptBytes?: number): void
  close(): void
}

function open(sampleEvery: number, maxRunning = 1 << 20): World {
  const ingress = Ingress.load({ sampleEvery })
  ingress.setMaxRunning(maxRunning)
  ingress.setReplica(3, 'model')
  const limits = { tokensPerSecond: 1e9, burstTokens: 1e9, maxRunning: 1 << 20 }
  ingress.setTenant(TENANT, { keys: [KEY, KEY], ...limits })
  const view = new DataView(new ArrayBuffer(HEADER_BYTES))
  return {
    ingress,
    hello(request, promptBytes = 1000) {
      const header = {
        ...{ type: MESSAGE_TYPES.hello, tenant: TENANT, request, promptBytes, maxTokens: 7 },
        ...{ timeUs: BigInt(Date.now()) * 1000n, fragments: fragmentsOf(promptBytes) },
      }
      writeHeader(view, header, sipKey(KEY))
      ingress.program.testRun(frame(new Uint8Array(view.buffer)))
    },
    close: () => ingress.close(),
  }
}

function listen(t: TestContext, world: World): NetEvents {
  const events = new NetEvents(world.ingress.object.map('events'))
  t.after(() => {
    events.close()
    world.close()
  })
  return events
}

test('a decision is not told of, or as another', { skip }, (t) => {
  const world = open(1, 40)
  const events = listen(t, world)
  const before = Date.now()
  for (let i = 1; i <= 60; i++) world.hello(BigInt(i) << 40n, 1000 + i)
  const told = events.after(0)
  assert.equal(told.length, 60)
  assert.equal(events.count, 60)
  const { granted, busy } = world.ingress.counters()
  assert.deepEqual([granted, busy], [40, 20])
  assert.deepEqual(
    told.map(({ decision }) => decision),
    Array.from({ length: 60 }, (_, i) => (i < 40 ? 'grant' : 'reject')),
  )
  const { timeMs, ...first } = told[0]!
  // The two clocks are compared once, so a few ms may have gone by between.
  assert.ok(timeMs > before - 1000 && timeMs < Date.now() + 1000, `${timeMs}`)
  assert.deepEqual(first, {
    ...{ number: 1, decision: 'grant', code: 'ok', request: '0000010000000000', tenant: TENANT },
    ...{ replica: 3, promptBytes: 1001, maxTokens: 7, retryMs: 0 },
  })
  const last = told.at(-1)!
  assert.equal(last.code, 'busy')
  assert.equal(last.replica, undefined)
  assert.equal(
    describeEvent(first as typeof last, 'nine'),
    'granted 0000010000000000 of nine: 1001 bytes and up to 7 tokens, engine 3',
  )
  world.hello(1n << 40n, 1001)
  const again = events.after(60).at(-1)!
  assert.equal(again.decision, 'repeat')
  assert.match(
    describeEvent(again, 'nine'),
    /^granted again 0000010000000000 of nine: .* engine 3$/,
  )
  assert.match(describeEvent(last, 'nine'), /^rejected 00003c0000000000 of nine: .* tokens, busy/)
  assert.deepEqual(
    events.after(58).map(({ number }) => number),
    [59, 60, 61],
  )
})

test('one in eight is not one in eight, or without sampling some are told of', { skip }, (t) => {
  const eighth = open(8)
  const [sampled, silent] = [listen(t, eighth), open(0)]
  const none = listen(t, silent)
  const times = 8000
  for (let i = 1; i <= times; i++) {
    eighth.hello(BigInt(i))
    if (i < 100) silent.hello(BigInt(i))
  }
  sampled.look()
  none.look()
  // 1,000 expected; six standard deviations are 178.
  t.diagnostic(`${sampled.count} of ${times}`)
  assert.ok(Math.abs(sampled.count - times / 8) < 178, `${sampled.count}`)
  assert.equal(eighth.ingress.counters()['events_lost'], 0)
  assert.equal(none.count, 0)
})

test('what the ring has no room for is not counted', { skip }, (t) => {
  const world = open(1)
  const events = listen(t, world)
  // Of 48 bytes each 21,845 fit into 1 MiB. All in one turn: nobody reads meanwhile.
  const times = 25_000
  for (let i = 1; i <= times; i++) world.hello(BigInt(i))
  events.look()
  const { events_lost: lost = 0 } = world.ingress.counters()
  assert.equal(events.count + lost, times)
  assert.ok(lost > 3000 && lost < 3300, `${lost}`)
  assert.equal(events.after(0).length, 1024, 'the latest thousand')
  world.hello(BigInt(times + 1))
  assert.equal(events.after(events.count).length, 1)
})

test('an odd number of decisions is sampled', () => {
  for (const sampleEvery of [3, -1, 1.5, 2 ** 31]) {
    assert.throws(() => Ingress.load({ sampleEvery }), { code: 'invalid_request' })
  }
})
