// Catches a replica that keeps memory for what never comes, believes a datagram about another, or
// never ends. Frames are made by hand, time by the test.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { openIntake, without } from '../../test/support/intakes.ts'
import { frame } from '../../test/support/packets.ts'
import type { WireAnswer, WireRequest } from './exchange.ts'
import {
  FRAGMENT_BYTES,
  fragmentsOf,
  type Header,
  HEADER_BYTES,
  hashOf,
  MESSAGE_CODES,
  MESSAGE_TYPES,
  readHeader,
  readTokens,
  readUsage,
  writeHeader,
  writeSampling,
} from './protocol.ts'
import type { IntakeLimits } from './intake.ts'
import { Replica } from './replica.ts'
import { NET_RINGS, type NetRing } from './ring-choice.ts'
import { sipKey } from './siphash.ts'

const SECRET = new Uint8Array(16).fill(5)
const KEY = sipKey(SECRET)
const KEYS = new Map([0, 1, 2, 3].map((tenant) => [tenant, [SECRET, SECRET] as const]))
const COOKIE = 77n
const SAMPLING = writeSampling({ temperature: 0, topP: 1, seed: 1n })

/** A replica, what it was asked to start and what it sent. */
class World {
  nowMs = 1000
  readonly started: { wire: WireRequest; answer: WireAnswer }[] = []
  readonly sent: { header: Header; payload: Uint8Array }[] = []
  readonly finished: [tenant: number, request: bigint, used: number][] = []
  readonly claimed: bigint[] = []
  aborts = 0
  readonly replica: Replica

  constructor(ring: NetRing, limits?: IntakeLimits) {
    const world = {
      now: () => this.nowMs,
      timeUs: () => 5n,
      claimed: (_tenant: number, request: bigint) => void this.claimed.push(request),
      start: (wire: WireRequest, answer: WireAnswer) => {
        this.started.push({ wire, answer })
        return () => void this.aborts++
      },
      finished: (...all: [number, bigint, number]) => void this.finished.push(all),
      send: (write: (bytes: Uint8Array) => number) => {
        const bytes = new Uint8Array(2048)
        const length = write(bytes)
        const view = new DataView(bytes.buffer, 42, length - 42)
        const header = readHeader(view, KEY)
        assert.ok(header, 'what it sends is not signed')
        this.sent.push({ header, payload: bytes.slice(42 + HEADER_BYTES, length) })
      },
    }
    this.replica = new Replica((events) => openIntake(ring, KEYS, world, events, limits), world)
  }

  hear(change: Partial<Header>, payload: Uint8Array = new Uint8Array()): void {
    const bytes = new Uint8Array(HEADER_BYTES + payload.length)
    bytes.set(payload, HEADER_BYTES)
    const header = { tenant: 1, request: 9n, route: 1, maxTokens: 50, ...change }
    writeHeader(new DataView(bytes.buffer), { ...header, payloadBytes: payload.length }, KEY)
    const packet = frame(bytes)
    this.replica.take(new DataView(packet.buffer), 0, packet.length)
  }

  data(prompt: Uint8Array, fragment: number, change: Partial<Header> = {}): void {
    const from = fragment * FRAGMENT_BYTES
    const payload = prompt.subarray(from, from + FRAGMENT_BYTES)
    const words: Header['words'] = [COOKIE, hashOf(KEY, payload), ...SAMPLING]
    const promptBytes = prompt.length
    this.hear({ type: MESSAGE_TYPES.data, promptBytes, fragment, words, ...change }, payload)
  }

  ack(firstMissing: number, change: Partial<Header> = {}): void {
    const words: Header['words'] = [COOKIE, BigInt(firstMissing), 0n, 64n]
    this.hear({ type: MESSAGE_TYPES.ack, words, ...change })
  }

  /** Lets time pass, with every turn that is wanted. */
  pass(ms: number): void {
    const end = this.nowMs + ms
    for (;;) {
      const next = this.replica.turn()
      if (next === undefined || next > end) break
      this.nowMs = Math.max(next, this.nowMs + 1)
    }
    this.nowMs = end
    this.replica.turn()
  }

  ends(): Header[] {
    const ends = this.sent.filter(({ header }) => header.type === MESSAGE_TYPES.end)
    return ends.map(({ header }) => header)
  }
}

function testBoth(name: string, body: (ring: NetRing) => void): void {
  for (const ring of NET_RINGS) test(`${ring}: ${name}`, { skip: without(ring) }, () => body(ring))
}

const prompt = (bytes: number) => Uint8Array.from({ length: bytes }, (_, i) => i * 7)

testBoth('a prompt arrives in another order, or twice, and is another prompt', (ring) => {
  const world = new World(ring)
  const whole = prompt(100_000)
  const order = Array.from({ length: fragmentsOf(whole.length) }, (_, i) => i ^ 3)
  const inside = order.filter((fragment) => fragment < order.length)
  for (const fragment of [...inside, ...inside]) world.data(whole, fragment)
  world.data(whole, 83)
  assert.equal(world.started.length, 1)
  assert.deepEqual(world.started[0]!.wire.prompt, whole)
  assert.deepEqual(world.claimed, [9n])
})

testBoth('a fragment that lies about itself is believed', (ring) => {
  const world = new World(ring)
  const whole = prompt(2400)
  world.data(whole, 0, { words: [COOKIE, 1n, ...SAMPLING] })
  world.data(whole, 2)
  world.data(whole, 65_535)
  world.data(prompt(2399), 1, { promptBytes: 2400 })
  world.data(whole, 1)
  assert.equal(world.started.length, 0)
  world.data(whole, 0)
  assert.deepEqual(world.started[0]?.wire.prompt, whole)
})

testBoth('every datagram is acknowledged, or one that waits for it is not', (ring) => {
  const world = new World(ring)
  const whole = prompt(40 * FRAGMENT_BYTES)
  for (let fragment = 0; fragment < 40; fragment++) {
    world.data(whole, fragment)
    world.replica.turn()
  }
  const said = () => world.sent.map(({ header }) => Number(header.words[1]))
  assert.deepEqual(said(), [16, 32, 40])
  world.data(whole, 0, { request: 10n })
  world.pass(9)
  assert.equal(said().length, 3)
  world.pass(1)
  assert.deepEqual(said(), [16, 32, 40, 1])
  // One that is missing is asked for at once.
  world.data(whole, 2, { request: 10n })
  world.pass(0)
  assert.deepEqual(said(), [16, 32, 40, 1, 1])
  assert.equal(world.sent.at(-1)?.header.words[2], 1n)
})

testBoth('a prompt that is only announced takes memory', (ring) => {
  const limits = { arrivingBytes: 300_000, arrivingBytesOfTenant: 200_000 }
  const world = new World(ring, limits)
  const huge = prompt(200_001)
  // Each takes memory for 64 fragments.
  for (let request = 1n; request <= 2n; request++) world.data(huge, 0, { request })
  assert.equal(world.ends().length, 0)
  world.data(huge, 0, { request: 3n })
  world.pass(10)
  assert.deepEqual(
    world.ends().map(({ code }) => code),
    [MESSAGE_CODES.tenant_busy],
  )
  world.data(huge, 0, { request: 4n, tenant: 2 })
  world.data(huge, 0, { request: 5n, tenant: 3 })
  world.pass(10)
  assert.equal(world.ends().at(-1)?.code, MESSAGE_CODES.busy)
  // What was taken comes back when they give up.
  world.pass(60_000)
  assert.equal(world.replica.size, 0)
  world.data(huge, 0, { request: 6n })
  world.data(huge, 0, { request: 7n })
  world.pass(10)
  const late = world.ends().filter(({ request }) => request > 5n)
  assert.equal(late.length, 0)
})

testBoth('an answer is cut, doubled or counted wrongly', (ring) => {
  const world = new World(ring)
  world.data(prompt(10), 0)
  const { answer } = world.started[0]!
  const text = '🙂é'.repeat(3000)
  const ids = Array.from({ length: 1000 }, (_, i) => i)
  answer.tokens(ids, text)
  answer.end('ok', { promptTokens: 11, cachedTokens: 3, outputTokens: 1001 })
  answer.tokens([5], 'too late')
  answer.end('failed', { promptTokens: 0, cachedTokens: 0, outputTokens: 0 })
  const got = new Map<number, Uint8Array>()
  for (let i = 0; i < 500 && !world.replica.settled; i++) {
    world.pass(5)
    for (const { header, payload } of world.sent) {
      assert.ok(payload.length <= FRAGMENT_BYTES)
      if (header.type === MESSAGE_TYPES.tokens) got.set(Number(header.words[2]), payload)
      if (header.type === MESSAGE_TYPES.end) got.set(Number(header.words[1]), payload)
    }
    world.ack(got.size)
  }
  const parts = [...got.keys()].toSorted((a, b) => a - b).map((number) => got.get(number)!)
  const read = parts.slice(0, -1).map((part) => readTokens(part)!)
  assert.equal(read.map((part) => part.text).join(''), text)
  assert.deepEqual(
    read.flatMap((part) => [...part.tokens]),
    ids,
  )
  const end = world.ends().at(-1)!
  assert.deepEqual(readUsage(end.words), { promptTokens: 11, cachedTokens: 3, outputTokens: 1001 })
  assert.deepEqual(world.finished, [[1, 9n, 3 + 1001]])
})

testBoth('END is said once, and a client that lost it never ends', (ring) => {
  const world = new World(ring)
  world.data(prompt(10), 0)
  world.started[0]!.answer.end('ok', { promptTokens: 1, cachedTokens: 0, outputTokens: 0 })
  world.pass(200)
  const before = world.ends().length
  assert.ok(before >= 3, `${before} times in 200 ms`)
  world.ack(1)
  world.pass(3000)
  assert.equal(world.ends().length, before, 'it goes on after its ACK')
  assert.equal(world.replica.size, 1, 'a late repeat would be a new request')
  world.pass(2000)
  assert.equal(world.replica.size, 0)
})

testBoth('a client that only says that it hears nothing is kept for ever', (ring) => {
  const world = new World(ring)
  world.data(prompt(10), 0)
  world.started[0]!.answer.end('ok', { promptTokens: 1, cachedTokens: 0, outputTokens: 0 })
  for (let i = 0; i < 40; i++) {
    world.ack(0)
    world.pass(1000)
  }
  assert.equal(world.replica.size, 0)
})

testBoth('a silent client’s request goes on, or a client that asks gets no answer', (ring) => {
  const world = new World(ring)
  world.data(prompt(10), 0)
  for (let i = 0; i < 10; i++) {
    world.pass(2000)
    const before = world.sent.length
    world.ack(0, { flags: 4 })
    world.pass(0)
    assert.equal(world.sent.length, before + 1)
    assert.equal(world.sent.at(-1)?.header.type, MESSAGE_TYPES.ack)
  }
  assert.equal(world.aborts, 0)
  world.pass(15_001)
  assert.equal(world.aborts, 1)
  assert.equal(world.ends()[0]?.code, MESSAGE_CODES.cancelled)
  assert.equal(world.finished.length, 1)
})

testBoth('a prompt that stops half way, or a deadline, is waited for', (ring) => {
  const world = new World(ring)
  world.data(prompt(5000), 0)
  world.pass(10_001)
  assert.equal(world.ends()[0]?.code, MESSAGE_CODES.timed_out)
  assert.deepEqual(world.finished, [[1, 9n, 300]], 'it pays for what arrived')
  world.data(prompt(10), 0, { request: 10n, deadlineMs: 300 })
  world.pass(299)
  assert.equal(world.aborts, 0)
  world.pass(2)
  assert.equal(world.aborts, 1)
  assert.equal(world.ends().at(-1)?.code, MESSAGE_CODES.timed_out)
})

testBoth('an ACK or CANCEL of nothing makes something', (ring) => {
  const world = new World(ring)
  world.ack(0)
  world.hear({ type: MESSAGE_TYPES.cancel, words: [COOKIE, 0n, 0n, 0n] })
  world.hear({ type: MESSAGE_TYPES.data, tenant: 4, promptBytes: 1 }, prompt(1))
  world.hear({ type: MESSAGE_TYPES.data, promptBytes: 0 })
  assert.equal(world.replica.size, 0)
  assert.equal(world.replica.turn(), undefined)
  world.data(prompt(10), 0)
  world.started[0]!.answer.tokens([1, 2], 'ab')
  world.hear({ type: MESSAGE_TYPES.cancel, words: [COOKIE, 0n, 0n, 0n] })
  world.pass(1)
  assert.equal(world.aborts, 1)
  assert.equal(readUsage(world.ends()[0]!.words).outputTokens, 2)
})
