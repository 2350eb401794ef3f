// Owns what should become of a packet at the ingress program, written a second time: from
// docs/protocol.md, RFC 768, 791 and 8200, and IEEE 802.1Q, not from the program.

import {
  cookieOf,
  HEADER_BYTES,
  MAX_TOKENS_MAX,
  MESSAGE_CODES,
  MESSAGE_TYPES,
  PROMPT_BYTES_MAX,
} from '../../src/net/protocol.ts'
import { sipHash, type SipKey } from '../../src/net/siphash.ts'

/** What the program was told. */
export interface OracleWorld {
  keys: readonly [SipKey, SipKey]
  secret: SipKey
  model: number
  /** Replicas that are ready and have a ring, from the first on. */
  replicas: number
  rings: number
  maxRunning: number
  /** Of the one tenant, whose index is 0. */
  tenantMaxRunning: number
  burstTokens: number
  /** Tokens that may have come back since the bucket was full. */
  leakTokens: number
  /** Bits of replicas, by the word of a HELLO. */
  prefixes: ReadonlyMap<bigint, bigint>
}

interface Known {
  cookie: bigint
  route: number
  promptBytes: number
  maxTokens: number
  model: number
  word: bigint
}

/** A counter's name, and with it what else it may be: a matter of microseconds. */
export interface Outcome {
  name: string
  or?: string
}

const WINDOW_US = 30_000_000
/** Between the clock that is asked here and the one in the program. */
const CLOCK_US = 100_000

export class Oracle {
  world: OracleWorld
  readonly known = new Map<bigint, Known>()
  charged = 0
  private running = 0
  private readonly load = [0, 0]
  private readonly mac = new DataView(new ArrayBuffer(8))

  constructor(world: OracleWorld) {
    this.world = world
  }

  /** All requests have ended and are forgotten; their charges went back. */
  forget(): void {
    this.known.clear()
    this.charged = 0
    this.running = 0
    this.load.fill(0)
  }

  /** Call `grant` if what it says is 'granted'. */
  outcome(view: DataView, length: number, nowUs: bigint): Outcome {
    const udp = datagramAt(view, length)
    if (udp === undefined || view.getUint16(udp + 2) !== 7411) return { name: 'passed' }
    const at = udp + 8
    const type = view.getUint8(at + 3)
    const payloadBytes = view.getUint16(at + 4)
    const key = this.world.keys[view.getUint16(at + 12)]
    const isHello = type === MESSAGE_TYPES.hello
    if (view.getUint16(at) !== 0x4c54 || view.getUint32(at + 8) !== 0 || !key) {
      return { name: 'bad_header' }
    }
    if (view.getUint16(udp + 4) !== 8 + HEADER_BYTES + payloadBytes) return { name: 'bad_header' }
    if (isHello && payloadBytes > 0) return { name: 'bad_header' }
    sipHash(key, view, at, at + 88, this.mac, 0)
    if (this.mac.getBigUint64(0) !== view.getBigUint64(at + 88)) return { name: 'bad_mac' }
    const version = view.getUint8(at + 2)
    if (isHello) return this.hello(view, udp, version, nowUs)
    const { data, ack, cancel } = MESSAGE_TYPES
    if (version !== 1 || (type !== data && type !== ack && type !== cancel)) {
      return { name: 'bad_type' }
    }
    return { name: this.forward(view, udp) }
  }

  /** The program has granted a HELLO: so it runs. */
  grant(view: DataView, udp: number): void {
    const at = udp + 8
    const promptBytes = view.getUint32(at + 40)
    const maxTokens = view.getUint32(at + 44)
    const replica = this.choose(view, at)
    const route = replica + 1
    this.known.set(view.getBigUint64(at + 16), {
      cookie: this.cookie(view, udp, route),
      route,
      promptBytes,
      maxTokens,
      model: view.getUint32(at + 36),
      word: view.getBigUint64(at + 56),
    })
    this.charged += Math.ceil(promptBytes / 4) + maxTokens
    this.running++
    this.load[replica]!++
  }

  /** The route and cookie that a grant or its repeat must have. */
  granted(request: bigint): Known | undefined {
    return this.known.get(request)
  }

  private hello(view: DataView, udp: number, version: number, nowUs: bigint): Outcome {
    const at = udp + 8
    if (version !== 1) return { name: 'version' }
    const off = Number(BigInt.asIntN(64, view.getBigUint64(at + 24) - nowUs))
    if (Math.abs(Math.abs(off) - WINDOW_US) < CLOCK_US) return { name: 'clock', or: '*' }
    if (Math.abs(off) > WINDOW_US) return { name: 'clock' }
    const promptBytes = view.getUint32(at + 40)
    const maxTokens = view.getUint32(at + 44)
    const isSized =
      promptBytes >= 1 &&
      promptBytes <= PROMPT_BYTES_MAX &&
      maxTokens >= 1 &&
      maxTokens <= MAX_TOKENS_MAX &&
      view.getUint16(at + 54) === Math.ceil(promptBytes / 1200)
    const isZero = [view.getUint32(at + 32), view.getUint16(at + 52), view.getUint16(at + 14)]
    const flags = view.getUint16(at + 6)
    if (!isSized || isZero.some((field) => field !== 0) || flags > 7) return { name: 'malformed' }
    const before = this.known.get(view.getBigUint64(at + 16))
    if (before) {
      const isSame =
        before.promptBytes === promptBytes &&
        before.maxTokens === maxTokens &&
        before.model === view.getUint32(at + 36) &&
        before.word === view.getBigUint64(at + 56) &&
        before.cookie === this.cookie(view, udp, before.route)
      return { name: isSame ? 'repeated' : 'request_reused' }
    }
    const { world } = this
    if (world.replicas === 0) return { name: 'no_replica' }
    const model = view.getUint32(at + 36)
    if (model !== 0 && model !== world.model) return { name: 'model' }
    if (this.running >= world.maxRunning) return { name: 'busy' }
    if (this.running >= world.tenantMaxRunning) return { name: 'tenant_busy' }
    const cost = Math.ceil(promptBytes / 4) + maxTokens
    if (cost > world.burstTokens) return { name: 'too_large' }
    const over = this.charged + cost - world.burstTokens
    if (over > world.leakTokens) return { name: 'rate' }
    return over > 0 ? { name: 'rate', or: 'granted' } : { name: 'granted' }
  }

  private choose(view: DataView, at: number): number {
    const { prefixes, replicas } = this.world
    const indices = [0, 1].slice(0, replicas)
    const least = (among: readonly number[]) =>
      among.toSorted((a, b) => this.load[a]! - this.load[b]! || a - b)[0]
    const any = least(indices) ?? 0
    for (const word of [3, 2, 1, 0]) {
      const holders = prefixes.get(view.getBigUint64(at + 56 + 8 * word))
      if (holders === undefined) continue
      const holder = least(indices.filter((index) => (holders >> BigInt(index)) & 1n))
      if (holder === undefined || this.load[holder]! > 1.5 * this.load[any]! + 4) return any
      return holder
    }
    return any
  }

  private forward(view: DataView, udp: number): string {
    const at = udp + 8
    const route = view.getUint32(at + 32)
    if (route === 0 || route > 16) return 'bad_cookie'
    if (view.getBigUint64(at + 56) !== this.cookie(view, udp, route)) return 'bad_cookie'
    const known = this.known.get(view.getBigUint64(at + 16))
    const isCurrent =
      known &&
      view.getUint32(at + 40) <= known.promptBytes &&
      view.getUint32(at + 44) <= known.maxTokens &&
      view.getUint32(at + 36) === known.model &&
      route === known.route
    if (!isCurrent) return 'stale'
    return route <= this.world.rings ? 'forwarded' : 'no_ring'
  }

  private cookie(view: DataView, udp: number, route: number): bigint {
    const request = view.getBigUint64(udp + 24)
    const port = view.getUint16(udp)
    return cookieOf(this.world.secret, { tenant: 0, route, request }, sourceOf(view), port)
  }
}

/** 16 bytes; IPv4 as ::ffff:a.b.c.d. */
function sourceOf(view: DataView): Uint8Array {
  const { ip, version } = networkAt(view, view.byteLength)!
  if (version === 6) return new Uint8Array(view.buffer, ip + 8, 16)
  const mapped = new Uint8Array(16).fill(255, 10, 12)
  mapped.set(new Uint8Array(view.buffer, ip + 12, 4), 12)
  return mapped
}

/** Where the IP header begins; undefined if there is none, or it is not whole. */
export function networkAt(
  view: DataView,
  length: number,
): { ip: number; version: 4 | 6 } | undefined {
  let type = view.getUint16(12)
  let ip = 14
  for (let tags = 0; tags < 2 && (type === 0x8100 || type === 0x88a8); tags++) {
    if (ip + 4 > length) return undefined
    type = view.getUint16(ip + 2)
    ip += 4
  }
  const [version, bytes] = type === 0x0800 ? ([4, 20] as const) : ([6, 40] as const)
  if (version === 6 && type !== 0x86dd) return undefined
  if (ip + bytes > length || view.getUint8(ip) >> 4 !== version) return undefined
  return { ip, version }
}

/** Where the UDP header of a datagram that could be ours begins: whole, and with room for one. */
export function datagramAt(view: DataView, length: number): number | undefined {
  const network = networkAt(view, length)
  if (!network) return undefined
  const { ip, version } = network
  let udp = ip + 40
  if (version === 4) {
    const words = view.getUint8(ip) & 15
    // More fragments, or an offset.
    if (words < 5 || (view.getUint16(ip + 6) & 0x3fff) !== 0) return undefined
    udp = ip + 4 * words
  }
  if (view.getUint8(ip + (version === 4 ? 9 : 6)) !== 17) return undefined
  return udp + 8 + HEADER_BYTES > length ? undefined : udp
}

/** Codes that the program says. */
export const REFUSALS = new Map(
  Object.entries(MESSAGE_CODES).map(([name, code]) => [code as number, name]),
)
