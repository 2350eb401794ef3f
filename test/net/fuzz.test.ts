// Catches a packet that the program lets through changed, answers without right, or counts twice or
// not at all: mutated packets by the thousand, seeded, each with its outcome known from two sides.
// LATTICE_FUZZ_PACKETS runs more of them (npm run fuzz:net runs ten million).

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Ingress } from '../../src/net/ingress.ts'
import { CONTROL } from '../../src/net/ingress-maps.ts'
import {
  cookieOf,
  fragmentsOf,
  HEADER_BYTES,
  MESSAGE_TYPES,
  writeHeader,
} from '../../src/net/protocol.ts'
import { sipHash, sipKey } from '../../src/net/siphash.ts'
import {
  CLIENT_4,
  CLIENT_6,
  CLIENT_PORT,
  frame,
  type FrameShape,
  udpOffset,
} from '../support/packets.ts'
import { Random } from '../support/random.ts'
import { WITHOUT_ROOT } from './namespaces.ts'

const PACKETS = Number(process.env['LATTICE_FUZZ_PACKETS'] ?? 200_000)
const SEED = Number(process.env['LATTICE_FUZZ_SEED'] ?? 1)
const PASS = 2
/** Ten million take minutes. */
const OPTIONS = { skip: WITHOUT_ROOT, timeout: 60_000 + PACKETS / 10 }
const KEY = Uint8Array.from({ length: 16 }, (_, i) => i * 11)
const KEY_HASH = sipKey(KEY)
/** Requests are forgotten after so many packets: their map holds 65,536. */
const EXPIRE_EVERY = 20_000

const SHAPES: FrameShape[] = [
  {},
  {},
  { vlans: 1 },
  { vlans: 2 },
  { options: 4 },
  { options: 40 },
  { ip: 6 },
  { ip: 6, vlans: 2 },
]

/** Values at which fields change their meaning. */
const EDGES = [0, 1, 2, 3, 4, 5, 8, 17, 20, 64, 94, 95, 96, 97, 104, 127, 128, 254, 255]

interface Sample {
  bytes: Uint8Array
  datagram: number
  /** As the cookie has it. */
  address: Uint8Array
}

test(`a mutated packet is miscounted or let through (seed ${SEED})`, OPTIONS, (t) => {
  const random = new Random(SEED)
  const ingress = Ingress.load()
  t.after(() => ingress.close())
  ingress.setMaxRunning(1 << 30)
  ingress.setReplica(0, 'model')
  const limits = { tokensPerSecond: 1e6, burstTokens: 1e9, maxRunning: 1 << 30 }
  ingress.setTenant(0, { keys: [KEY, KEY], ...limits })
  const secret = sipKey(new Uint8Array(ingress.object.map('controls').view(), CONTROL.cookieKey))
  const samples = makeSamples()
  const packet = new Uint8Array(2048)
  const view = new DataView(packet.buffer)
  const out = new Uint8Array(2048)
  const run = ingress.program.testRunner(packet, out)
  const actions = [0, 0, 0, 0, 0]
  let ours = 0
  for (let i = 0; i < PACKETS; i++) {
    const { bytes, datagram, address } = samples[random.below(samples.length)]!
    packet.set(bytes)
    const request = BigInt(random.below(5_000))
    view.setBigUint64(datagram + 16, request)
    view.setBigUint64(datagram + 24, BigInt(Date.now()) * 1000n)
    if (view.getUint32(datagram + 32) === 1) {
      const cookie = cookieOf(secret, { tenant: 0, route: 1, request }, address, CLIENT_PORT)
      view.setBigUint64(datagram + 56, cookie)
    }
    sipHash(KEY_HASH, view, datagram, datagram + 88, view, datagram + 88)
    const length = mutate(packet, bytes.length, datagram, random)
    // Half of them get past the MAC, so that what is behind it is seen too.
    if (random.below(2) === 0 && length >= datagram + HEADER_BYTES) {
      sipHash(KEY_HASH, view, datagram, datagram + 88, view, datagram + 88)
    }
    if (isOurs(view, length)) ours++
    const action = run(length)
    actions[action]!++
    if (action === PASS && Buffer.compare(packet.subarray(0, length), out.subarray(0, length))) {
      assert.fail(`packet ${i} is let through changed`)
    }
    if (i % EXPIRE_EVERY === 0) {
      ingress.expire(() => false, process.hrtime.bigint() + 100_000_000_000n)
      ingress.expire(() => false, process.hrtime.bigint() + 100_000_000_000n)
    }
  }
  const c = ingress.counters()
  const dropped = sum(c, ['bad_header', 'bad_mac', 'bad_type', 'bad_cookie', 'stale', 'no_ring'])
  const answered = sum(c, ['granted', 'repeated', 'rejected'])
  t.diagnostic(JSON.stringify(c))
  assert.equal(c['passed']! + dropped + answered + c['forwarded']!, PACKETS)
  assert.deepEqual(actions, [0, dropped, c['passed'], answered, c['forwarded']])
  assert.equal(PACKETS - c['passed']!, ours, 'what is ours is read otherwise here')
  assert.equal(c['hello'], answered)
  const codes = ['version', 'clock', 'malformed', 'model', 'request_reused', 'busy', 'tenant_busy']
  const reasons = sum(c, [...codes, 'rate', 'no_replica', 'too_large'])
  assert.equal(c['rejected'], reasons)
  for (const name of ['granted', 'repeated', 'bad_mac', 'bad_cookie', 'stale', 'no_ring']) {
    assert.ok(c[name]! > 0, `no packet was ${name}`)
  }
  assert.equal(ingress.use(0).granted, c['granted'])
  assert.equal(ingress.use(0).rejected, c['rejected'])
})

function sum(counters: Record<string, number>, names: readonly string[]): number {
  return names.reduce((total, name) => total + counters[name]!, 0)
}

const MAPPED = Uint8Array.of(...Array<number>(10).fill(0), 255, 255, ...CLIENT_4)

function makeSamples(): Sample[] {
  const types = ['hello', 'hello', 'data', 'ack', 'cancel', 'grant'] as const
  return SHAPES.flatMap((shape) =>
    types.map((type) => {
      const payload = new Uint8Array(type === 'data' ? 200 : 0)
      const datagram = new Uint8Array(HEADER_BYTES + payload.length)
      const header = { type: MESSAGE_TYPES[type], promptBytes: 5000, maxTokens: 1 }
      const fragments = type === 'hello' ? fragmentsOf(5000) : 0
      const route = type === 'hello' ? 0 : 1
      const rest = { payloadBytes: payload.length, fragments, route }
      writeHeader(new DataView(datagram.buffer), { ...header, ...rest }, KEY_HASH)
      const address = shape.ip === 6 ? CLIENT_6 : MAPPED
      return { bytes: frame(datagram, shape), datagram: udpOffset(shape) + 8, address }
    }),
  )
}

/** Changes a packet in up to four places. Returns its new length. */
function mutate(packet: Uint8Array, length: number, datagram: number, random: Random): number {
  let bytes = length
  for (let times = random.below(5); times > 0; times--) {
    const kind = random.below(8)
    // The header of the datagram, or any byte of the packet.
    const at = random.below(2) ? datagram + random.below(HEADER_BYTES) : random.below(bytes)
    if (kind < 3) packet[at] = packet[at]! ^ (1 << random.below(8))
    else if (kind < 5) packet[at] = EDGES[random.below(EDGES.length)]!
    else if (kind < 6) packet[at] = random.below(256)
    else if (kind < 7) bytes = 14 + random.below(bytes - 13)
    else {
      const more = random.below(64)
      for (let i = 0; i < more; i++) packet[bytes + i] = random.below(256)
      bytes += more
    }
  }
  return bytes
}

/** Whether a frame is a datagram to our port, read by the RFCs and not by the program. */
function isOurs(view: DataView, length: number): boolean {
  let type = view.getUint16(12)
  let at = 14
  for (let tags = 0; tags < 2 && (type === 0x8100 || type === 0x88a8); tags++) {
    if (at + 4 > length) return false
    type = view.getUint16(at + 2)
    at += 4
  }
  let udp: number
  if (type === 0x0800) {
    if (at + 20 > length || view.getUint8(at) >> 4 !== 4 || view.getUint8(at + 9) !== 17)
      return false
    const words = view.getUint8(at) & 15
    // More fragments, or an offset.
    if (words < 5 || (view.getUint16(at + 6) & 0x3fff) !== 0) return false
    udp = at + 4 * words
  } else if (type === 0x86dd) {
    if (at + 40 > length || view.getUint8(at) >> 4 !== 6 || view.getUint8(at + 6) !== 17)
      return false
    udp = at + 40
  } else return false
  if (udp + 8 + HEADER_BYTES > length) return false
  return view.getUint16(udp + 2) === 7411
}
