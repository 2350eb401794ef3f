// Owns packets by the million for the ingress program, each changed in up to four places, each with
// what should become of it known before. Seeded; a packet that is treated otherwise is the result.

import type { Ingress } from '../../src/net/ingress.ts'
import { CONTROL } from '../../src/net/ingress-maps.ts'
import {
  cookieOf,
  fragmentsOf,
  HEADER_BYTES,
  MESSAGE_TYPES,
  modelHash,
  writeHeader,
} from '../../src/net/protocol.ts'
import { sipHash, sipKey } from '../../src/net/siphash.ts'
import {
  CLIENT_4,
  CLIENT_6,
  CLIENT_PORT,
  frame,
  type FrameShape,
  udpChecksum,
  udpOffset,
} from '../support/packets.ts'
import { Random } from '../support/random.ts'
import { datagramAt, networkAt, Oracle, REFUSALS } from './oracle.ts'

export const [DROP, PASS, TX, REDIRECT] = [1, 2, 3, 4]
const KEYS = [11, 13].map((by) => Uint8Array.from({ length: 16 }, (_, i) => i * by)) as [
  Uint8Array,
  Uint8Array,
]
const SIP_KEYS = [sipKey(KEYS[0]), sipKey(KEYS[1])] as const
const MODEL = 'model'
/** Requests are forgotten after so many packets, and the world changes. */
const EPOCH = 20_000

const SHAPES: FrameShape[] = [
  {},
  {},
  { vlans: 1 },
  { vlans: 2 },
  { options: 4 },
  { options: 40 },
  { ip: 6 },
  { ip: 6, vlans: 2 },
  { ip: 6, extensions: [60] },
]

/** Values at which fields change their meaning. */
const EDGES = [0, 1, 2, 3, 4, 5, 8, 17, 20, 64, 94, 95, 96, 97, 104, 127, 128, 254, 255]

const UNBOUNDED = { maxRunning: 1 << 30, tenantMaxRunning: 1 << 30, burstTokens: 1e9 }
const USUAL = { replicas: 2, rings: 1, ...UNBOUNDED }
/** In turn: each has its own reason to refuse. */
const WORLDS = [
  USUAL,
  { ...USUAL, maxRunning: 100 },
  { ...USUAL, tenantMaxRunning: 100 },
  { ...USUAL, burstTokens: 300_000 },
  { ...USUAL, replicas: 0 },
  { ...USUAL, replicas: 1, rings: 0 },
]
const TOKENS_PER_SECOND = 10
/** Tokens that come back during an epoch, on a machine that is very busy. */
const LEAK = 600

interface Sample {
  bytes: Uint8Array
  datagram: number
  address: Uint8Array
  isHello: boolean
}

export interface MutationReport {
  /** What was expected, by counter: without what is only implied by it. */
  expected: Record<string, number>
  actions: number[]
  /** Granted by the program, and how many tokens it charged for them, as the oracle has it. */
  granted: number
  seconds: number
}

/** @throws Error with the packet that was treated otherwise */
export function runMutations(
  ingress: Ingress,
  ringFd: number,
  { seed, packets }: { seed: number; packets: number },
): MutationReport {
  const started = performance.now()
  const random = new Random(seed)
  const secret = sipKey(new Uint8Array(ingress.object.map('controls').view(), CONTROL.cookieKey))
  // Most are at the second replica, so that it is passed over in the end.
  const prefixes = new Map([
    [0xa1n, 1n],
    [0xa2n, 2n],
    [0xa3n, 3n],
    [0xa4n, 2n],
    [0xa0n, 2n],
  ])
  for (const [hash, holders] of prefixes) ingress.publish(hash, holders)
  const model = modelHash(MODEL)
  const fixed = { keys: SIP_KEYS, secret, model, prefixes, leakTokens: LEAK }
  const oracle = new Oracle({ ...fixed, ...USUAL })
  const samples = makeSamples()
  const packet = new Uint8Array(2048)
  const view = new DataView(packet.buffer)
  const out = new Uint8Array(2048)
  const run = ingress.program.testRunner(packet, out)
  const actions = [0, 0, 0, 0, 0]
  const expected: Record<string, number> = {}
  let granted = 0
  for (let i = 0; i < packets; i++) {
    if (i % EPOCH === 0) {
      if (i > 0 && ingress.use(0).chargedTokens !== oracle.charged) {
        throw new Error(`${ingress.use(0).chargedTokens} tokens charged for ${oracle.charged}`)
      }
      forgetAll(ingress)
      oracle.forget()
      oracle.world = { ...fixed, ...WORLDS[(i / EPOCH) % WORLDS.length]! }
      tell(ingress, ringFd, oracle.world)
    }
    const length = make(view, random.pick(samples), random, oracle)
    const udp = datagramAt(view, length)
    const want = oracle.outcome(view, length, BigInt(Date.now()) * 1000n)
    const action = run(length)
    actions[action]!++
    const name = action === TX ? answered(out, length, udp!, oracle) : want.name
    const isAsSaid = name === want.name || name === want.or || want.or === '*'
    if (!isAsSaid || action !== actionOf(name)) {
      const hex = Buffer.from(packet.subarray(0, length)).toString('hex')
      throw new Error(`packet ${i} is ${want.name}, not ${name} (action ${action}): ${hex}`)
    }
    if (action === PASS && Buffer.compare(packet.subarray(0, length), out.subarray(0, length))) {
      throw new Error(`packet ${i} is let through changed`)
    }
    if (name === 'granted') {
      granted++
      oracle.grant(view, udp!)
    }
    if (action === TX) checkAnswer(out, view, length, udp!, oracle, i)
    expected[name] = (expected[name] ?? 0) + 1
  }
  return { expected, actions, granted, seconds: (performance.now() - started) / 1000 }
}

function forgetAll(ingress: Ingress): void {
  const later = process.hrtime.bigint() + 100_000_000_000n
  // The first ends them, the second forgets them.
  for (let i = 0; i < 2; i++) ingress.expire(() => false, later)
}

function tell(ingress: Ingress, ringFd: number, world: Oracle['world']): void {
  ingress.setMaxRunning(world.maxRunning)
  ingress.setTenant(0, {
    keys: KEYS,
    tokensPerSecond: TOKENS_PER_SECOND,
    burstTokens: world.burstTokens,
    maxRunning: world.tenantMaxRunning,
  })
  for (const index of [0, 1]) ingress.setReplica(index, index < world.replicas ? MODEL : undefined)
  if (world.rings > 0) ingress.setRing(0, ringFd)
  else ingress.object.map('rings').delete(new Uint8Array(4))
}

/** Writes a packet, changed; returns its length. */
function make(view: DataView, sample: Sample, random: Random, oracle: Oracle): number {
  const packet = new Uint8Array(view.buffer)
  const { bytes, datagram, address, isHello } = sample
  packet.set(bytes)
  // What is asked for follows from the number, so that some HELLOs are repeats.
  const number = random.below(2_000)
  const request = BigInt(number)
  view.setBigUint64(datagram + 16, request)
  view.setUint32(datagram + 44, number % 16 === 0 ? 400_000 : 1)
  view.setBigUint64(datagram + 24, BigInt(Date.now()) * 1000n)
  view.setUint16(datagram + 12, random.below(2))
  if (isHello) {
    view.setUint32(datagram + 36, number % 2 === 0 ? oracle.world.model : 0)
    view.setBigUint64(datagram + 56, BigInt(0xa0 + (number % 5)))
    view.setBigUint64(datagram + 64, number % 4 ? 0n : BigInt(0xa0 + (number % 7)))
  } else {
    const known = oracle.granted(request)
    const { secret } = oracle.world
    const route = known?.route ?? 1
    const cookie = cookieOf(secret, { tenant: 0, route, request }, address, CLIENT_PORT)
    view.setUint32(datagram + 32, route)
    view.setUint32(datagram + 36, known?.model ?? 0)
    view.setBigUint64(datagram + 56, cookie)
  }
  sign(view, datagram)
  const length = mutate(packet, bytes.length, datagram, random)
  // Half of them get past the MAC, so that what is behind it is seen too.
  if (random.below(2) === 0 && length >= datagram + HEADER_BYTES) sign(view, datagram)
  return length
}

function sign(view: DataView, datagram: number): void {
  const key = SIP_KEYS[view.getUint16(datagram + 12) === 1 ? 1 : 0]
  sipHash(key, view, datagram, datagram + 88, view, datagram + 88)
}

/** What an answer says became of its HELLO. */
function answered(out: Uint8Array, length: number, udp: number, oracle: Oracle): string {
  const view = new DataView(out.buffer, 0, length)
  if (view.getUint8(udp + 8 + 3) === MESSAGE_TYPES.reject) {
    return REFUSALS.get(view.getUint16(udp + 8 + 14)) ?? 'nothing'
  }
  return oracle.granted(view.getBigUint64(udp + 8 + 16)) ? 'repeated' : 'granted'
}

function actionOf(name: string): number | undefined {
  if (name === 'passed') return PASS
  if (name === 'forwarded') return REDIRECT
  const isAnswer =
    name === 'granted' || name === 'repeated' || [...REFUSALS.values()].includes(name)
  return isAnswer ? TX : DROP
}

function checkAnswer(
  out: Uint8Array,
  asked: DataView,
  length: number,
  udp: number,
  oracle: Oracle,
  i: number,
): void {
  const fail = (what: string): never => {
    const hex = Buffer.from(asked.buffer, 0, length).toString('hex')
    throw new Error(`the answer to packet ${i} ${what}: ${hex}`)
  }
  const at = udp + 8
  const view = new DataView(out.buffer, 0, length)
  if (view.getUint16(udp) !== 7411 || view.getUint16(udp + 2) !== asked.getUint16(udp)) {
    fail('goes elsewhere')
  }
  const { ip, version } = networkAt(view, length)!
  const options = version === 4 ? udp - ip - 20 : 0
  const shape: FrameShape = { ip: version, vlans: (ip - 14) / 4, options }
  if (udpChecksum(out.subarray(0, udp + 8 + HEADER_BYTES), shape) !== 0) fail('has a wrong sum')
  const mac = new DataView(new ArrayBuffer(8))
  sipHash(SIP_KEYS[view.getUint16(at + 12) & 1]!, view, at, at + 88, mac, 0)
  if (mac.getBigUint64(0) !== view.getBigUint64(at + 88)) fail('is not signed')
  if (view.getUint8(at + 3) === MESSAGE_TYPES.reject) return
  const known = oracle.granted(view.getBigUint64(at + 16))
  if (view.getUint32(at + 32) !== known?.route || view.getBigUint64(at + 56) !== known.cookie) {
    fail(`has route ${view.getUint32(at + 32)}, not ${known?.route}`)
  }
}

function makeSamples(): Sample[] {
  const mapped = new Uint8Array(16).fill(255, 10, 12)
  mapped.set(CLIENT_4, 12)
  const types = ['hello', 'hello', 'data', 'ack', 'cancel', 'grant'] as const
  return SHAPES.flatMap((shape) =>
    types.map((type) => {
      const payloadBytes = type === 'data' ? 200 : 0
      const datagram = new Uint8Array(HEADER_BYTES + payloadBytes)
      const isHello = type === 'hello'
      const header = { type: MESSAGE_TYPES[type], promptBytes: 5000, maxTokens: 1, payloadBytes }
      const fragments = isHello ? fragmentsOf(5000) : 0
      writeHeader(new DataView(datagram.buffer), { ...header, fragments }, SIP_KEYS[0])
      return {
        bytes: frame(datagram, shape),
        datagram: udpOffset(shape) + 8,
        address: shape.ip === 6 ? CLIENT_6 : mapped,
        isHello,
      }
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
    else if (kind < 5) packet[at] = random.pick(EDGES)
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
