// Catches a tenant that can end the ring thread, keep memory or places, or have a request counted
// twice, by datagrams that are signed and still nonsense. Seeded; time is the test's.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { openIntake, without } from '../../test/support/intakes.ts'
import { frame, type FrameShape } from '../../test/support/packets.ts'
import { Random } from '../../test/support/random.ts'
import type { WireAnswer, WireRequest } from './exchange.ts'
import {
  FRAGMENT_BYTES,
  type Header,
  HEADER_BYTES,
  hashOf,
  MESSAGE_TYPES,
  type MessageCode,
  readHeader,
  writeHeader,
} from './protocol.ts'
import { Replica } from './replica.ts'
import { NET_RINGS, type NetRing } from './ring-choice.ts'
import { sipKey } from './siphash.ts'

const DATAGRAMS = 20_000
const SEED = Number(process.env['LATTICE_FUZZ_SEED'] ?? 1)
const SECRET = new Uint8Array(16).fill(5)
const KEY = sipKey(SECRET)
const KEYS = new Map([0, 1, 2, 3].map((tenant) => [tenant, [SECRET, SECRET] as const]))
const SHAPES: FrameShape[] = [{}, { vlans: 2 }, { options: 40 }, { ip: 6 }]
const CODES: MessageCode[] = ['ok', 'length', 'failed', 'context']
const EDGES = [0n, 1n, 2n, 63n, 64n, 65n, 255n, 65535n, 2n ** 31n, 2n ** 32n - 1n, 2n ** 53n]

/** Values at which numbers change their meaning, or any. */
function odd(random: Random, bits: number): bigint {
  const any = BigInt(random.below(2 ** 32)) * 2n ** 32n + BigInt(random.below(2 ** 32))
  return BigInt.asUintN(bits, random.below(3) > 0 ? random.pick(EDGES) : any)
}

class World {
  nowMs = 1000
  /** By tenant and request: places that are taken. */
  readonly places = new Set<string>()
  readonly running = new Set<WireAnswer>()
  sent = 0
  /** What was done in each step; in which order within it is nobody's business. */
  readonly story: string[] = []
  private done: string[] = []
  readonly replica: Replica
  private readonly random: Random

  constructor(random: Random, ring: NetRing) {
    this.random = random
    const world = {
      now: () => this.nowMs,
      timeUs: () => 5n,
      claimed: (tenant: number, request: bigint) => {
        const id = `${tenant}:${request}`
        assert.ok(!this.places.has(id), `${id} is claimed twice`)
        this.places.add(id)
      },
      finished: (tenant: number, request: bigint, used: number) => {
        assert.ok(this.places.delete(`${tenant}:${request}`), 'what has no place is finished')
        assert.ok(used >= 0 && used < 2 ** 26, `${used} tokens`)
        this.done.push(`finished ${tenant}:${request} ${used}`)
      },
      start: (wire: WireRequest, answer: WireAnswer) => this.start(wire, answer),
      send: (write: (bytes: Uint8Array) => number) => {
        const bytes = new Uint8Array(2048)
        const length = write(bytes)
        assert.ok(length > 0 && length <= 1500, `a frame of ${length} bytes`)
        this.sent++
        this.done.push(`sent ${Buffer.from(bytes.subarray(0, length)).toString('hex')}`)
      },
    }
    this.replica = new Replica((events) => openIntake(ring, KEYS, world, events), world)
  }

  /** Says something in every running answer, or nothing, or its end. */
  speak(): void {
    for (const answer of this.running) {
      const choice = this.random.below(6)
      if (choice < 3) answer.tokens([choice], 'wörd '.repeat(choice * 100))
      if (choice === 5) this.end(answer)
    }
  }

  step(): void {
    this.story.push(`${this.replica.size} ${this.done.toSorted().join()}`)
    this.done = []
  }

  end(answer: WireAnswer): void {
    this.running.delete(answer)
    answer.end(this.random.pick(CODES), { promptTokens: 9, cachedTokens: 3, outputTokens: 5 })
  }

  private start({ prompt }: WireRequest, answer: WireAnswer): () => void {
    assert.ok(prompt.length > 0 && prompt.length <= 5 * FRAGMENT_BYTES)
    this.running.add(answer)
    this.done.push(`started ${Buffer.from(prompt).toString('hex')}`)
    return () => void this.running.delete(answer)
  }
}

/** A datagram whose header is signed, and right in some of its fields. */
function datagram(random: Random): Uint8Array {
  const promptBytes = random.pick([1, 1199, 1200, 1201, 5000, 6000])
  const fragment = random.below(Math.ceil(promptBytes / FRAGMENT_BYTES))
  const isData = random.below(2) === 0
  const size = Math.min(FRAGMENT_BYTES, promptBytes - fragment * FRAGMENT_BYTES)
  const payload = new Uint8Array(isData ? size : 0).fill(fragment)
  const { data, ack, cancel } = MESSAGE_TYPES
  const type = isData ? data : random.pick([ack, ack, ack, cancel])
  const second = isData ? hashOf(KEY, payload) : BigInt(random.below(8))
  const header: Partial<Header> = {
    type,
    tenant: random.below(3),
    request: BigInt(random.below(300)),
    route: 1,
    promptBytes,
    maxTokens: 50,
    fragment,
    payloadBytes: payload.length,
    words: [77n, second, isData ? 0n : odd(random, 64), isData ? 1n : 64n],
  }
  for (let times = random.below(3); times > 0; times--) change(header, random)
  const bytes = new Uint8Array(HEADER_BYTES + payload.length)
  bytes.set(payload, HEADER_BYTES)
  writeHeader(new DataView(bytes.buffer), header, KEY)
  return bytes
}

function change(header: Partial<Header>, random: Random): void {
  const small = (bits: number) => Number(odd(random, bits))
  const changes: (() => void)[] = [
    () => (header.type = random.below(12)),
    () => (header.flags = small(16)),
    () => (header.tenant = random.below(6)),
    () => (header.key = random.below(3)),
    () => (header.route = small(32)),
    () => (header.maxTokens = small(32)),
    () => (header.deadlineMs = small(32)),
    () => (header.fragment = small(16)),
    () => (header.payloadBytes = small(16)),
    () => (header.version = random.below(3)),
    () => (header.words![random.below(4)] = odd(random, 64)),
    () => (header.timeUs = odd(random, 64)),
  ]
  random.pick(changes)()
}

/** What each did, by ring: both are asked the same. */
const stories = new Map<NetRing, string[]>()

for (const ring of NET_RINGS) {
  test(`${ring}: signed nonsense ends it, or keeps a place (seed ${SEED})`, (t) => {
    if (without(ring)) t.skip(without(ring) || '')
    else stories.set(ring, fuzz(ring))
  })
}

test('the two rings understand the protocol differently', { skip: without('native') }, () => {
  const [one, other] = NET_RINGS.map((ring) => stories.get(ring) ?? [])
  assert.ok(one!.length > DATAGRAMS / 8)
  one!.forEach((line, i) => assert.equal(other![i], line, `line ${i}`))
  assert.equal(one!.length, other!.length)
})

/** Returns what was sent, started and finished, a line a step. */
function fuzz(ring: NetRing): string[] {
  const random = new Random(SEED)
  const world = new World(random, ring)
  for (let i = 0; i < DATAGRAMS; i++) {
    const packet = frame(datagram(random), random.pick(SHAPES))
    // Cut off, or with bytes behind it.
    const cut = random.below(20) === 0 ? random.between(150, packet.length) : packet.length
    const memory = new Uint8Array(2048)
    memory.set(packet)
    world.replica.take(new DataView(memory.buffer), 0, Math.min(cut, packet.length))
    if (random.below(8) === 0) world.speak()
    world.step()
    if (random.below(4) > 0) continue
    world.nowMs += random.below(200) === 0 ? random.below(20_000) : random.below(10)
    world.replica.turn()
    world.step()
  }
  assert.ok(world.sent > DATAGRAMS / 20, `${world.sent} datagrams were sent`)
  for (const answer of world.running) world.end(answer)
  // Longer than anything is waited for.
  for (let seconds = 0; seconds < 120; seconds++) {
    world.nowMs += 1000
    world.replica.turn()
    world.step()
  }
  assert.equal(world.places.size, 0, 'a place is kept')
  assert.equal(world.replica.size, 0, 'an exchange is kept')
  assert.equal(world.replica.arrivingBytes, 0, 'memory for prompts is kept')
  return world.story
}

test('what is signed is refused to be read (an oracle of the test itself)', () => {
  const random = new Random(SEED)
  let whole = 0
  for (let i = 0; i < 1000; i++) {
    const bytes = datagram(random)
    if (readHeader(new DataView(bytes.buffer), KEY)) whole++
  }
  assert.ok(whole > 800, `only ${whole} of 1000 datagrams are what they claim`)
})
