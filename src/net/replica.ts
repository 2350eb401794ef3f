// Owns the engine's end of the datagram protocol: which request a frame belongs to, when each has
// its turn, and how much memory unfinished prompts may take. The ingress program has let every
// datagram in by its MAC and cookie; what is in it is checked here. No I/O, no clock of its own.

import { Exchange, type ExchangeWorld } from './exchange.ts'
import { type FrameLayout, layoutOf, ReturnPath } from './frame.ts'
import { FIELDS, type Header, headerAt, isDatagram, MESSAGE_TYPES } from './protocol.ts'
import type { SipKey } from './siphash.ts'
import { Turns } from './turns.ts'

export interface ReplicaWorld extends Omit<ExchangeWorld, 'reserve' | 'touch'> {
  /** The first DATA of a granted request is here: from now on it will be `finished`. */
  claimed(tenant: number, request: bigint): void
}

export interface ReplicaLimits {
  /** Bytes of prompts that are not complete: of all tenants, and of one. */
  arrivingBytes: number
  arrivingBytesOfTenant: number
}

/** One prompt of the largest size a tenant, and four tenants that send such. */
export const REPLICA_LIMITS: ReplicaLimits = {
  arrivingBytes: 256 << 20,
  arrivingBytesOfTenant: 64 << 20,
}

export class Replica {
  /** By a mixture of their numbers; those with the same one follow each other. */
  private readonly exchanges = new Map<number, Exchange>()
  private readonly turns = new Turns<Exchange>()
  /** Requests that are remembered, and those of them that have something to say or to hear. */
  private count = 0
  private unsettled = 0
  private readonly keys: (tenant: number, index: number) => SipKey | undefined
  private readonly world: ReplicaWorld & ExchangeWorld
  private readonly limits: ReplicaLimits
  private readonly arriving = new Map<number, number>()
  private arrivingBytes = 0

  /** @param keys by tenant, and which of its two */
  constructor(
    keys: (tenant: number, index: number) => SipKey | undefined,
    world: ReplicaWorld,
    limits: ReplicaLimits = REPLICA_LIMITS,
  ) {
    this.keys = keys
    this.limits = limits
    this.world = {
      ...world,
      touch: (exchange) => this.turns.touch(exchange),
      reserve: (tenant, bytes) => this.reserve(tenant, bytes),
    }
  }

  /** Requests that are remembered, whether they run or only linger. */
  get size(): number {
    return this.count
  }

  /** Nothing is left to say or to hear. */
  get settled(): boolean {
    return this.unsettled === 0
  }

  /** A frame that the ingress program redirected here: it has checked the header and its MAC. */
  take(view: DataView, at: number, bytes: number): void {
    const layout = layoutOf(view, at, bytes)
    if (!layout || !isDatagram(view, layout.data, layout.dataBytes)) return
    const { data, dataBytes } = layout
    const exchange = this.find(view, data) ?? this.open(view, at, layout)
    if (!exchange) return
    exchange.take(view, data, dataBytes)
  }

  /** Sends what is due. Returns when there is more to do if nothing arrives; undefined if never. */
  turn(): number | undefined {
    return this.turns.run(this.world.now(), (exchange) => {
      const next = exchange.turn()
      const isSettled = next === undefined || exchange.settled
      if (isSettled !== exchange.wasSettled) this.unsettled += isSettled ? -1 : 1
      exchange.wasSettled = isSettled
      if (next === undefined) this.forget(exchange)
      return next
    })
  }

  private find(view: DataView, at: number): Exchange | undefined {
    const tenant = view.getUint32(at + FIELDS.tenant)
    const high = view.getUint32(at + FIELDS.request)
    const low = view.getUint32(at + FIELDS.request + 4)
    let exchange = this.exchanges.get(placeOf(tenant, high, low))
    while (exchange && !isOf(exchange, tenant, high, low)) exchange = exchange.next
    return exchange
  }

  /** Undefined for what comes late after the end, or answers nothing. */
  private open(view: DataView, at: number, layout: FrameLayout): Exchange | undefined {
    const { data } = layout
    const type = view.getUint8(data + FIELDS.type)
    // CANCEL may come before any DATA.
    if (type !== MESSAGE_TYPES.data && type !== MESSAGE_TYPES.cancel) return undefined
    if (view.getUint32(data + FIELDS.promptBytes) === 0) return undefined
    const key = this.keys(view.getUint32(data + FIELDS.tenant), view.getUint16(data + FIELDS.key))
    if (!key) return undefined
    const asked = headerAt(view, data)
    const exchange = new Exchange(asked, key, new ReturnPath(view, at, layout), this.world)
    const place = placeFor(asked)
    exchange.next = this.exchanges.get(place)
    this.exchanges.set(place, exchange)
    this.count++
    this.unsettled++
    this.world.claimed(asked.tenant, asked.request)
    return exchange
  }

  /** Once: it may be in the queue of turns twice. */
  private forget(exchange: Exchange): void {
    const place = placeFor(exchange.asked)
    const first = this.exchanges.get(place)
    if (first === exchange) {
      this.count--
      if (exchange.next) this.exchanges.set(place, exchange.next)
      else this.exchanges.delete(place)
      return
    }
    let before = first
    while (before && before.next !== exchange) before = before.next
    if (!before) return
    this.count--
    before.next = exchange.next
  }

  private reserve(tenant: number, bytes: number): 'ok' | 'busy' | 'tenant_busy' {
    const ofTenant = (this.arriving.get(tenant) ?? 0) + bytes
    if (bytes > 0) {
      if (ofTenant > this.limits.arrivingBytesOfTenant) return 'tenant_busy'
      if (this.arrivingBytes + bytes > this.limits.arrivingBytes) return 'busy'
    }
    this.arrivingBytes += bytes
    if (ofTenant > 0) this.arriving.set(tenant, ofTenant)
    else this.arriving.delete(tenant)
    return 'ok'
  }
}

/** Numbers are the client's to choose: whoever chooses many for one place slows himself down. */
function placeOf(tenant: number, high: number, low: number): number {
  const mixed =
    Math.imul(low ^ Math.imul(high, 0x85ebca6b), 0x9e3779b1) ^ Math.imul(tenant, 0xc2b2ae35)
  return mixed ^ (mixed >>> 15)
}

function placeFor({ tenant, request }: Header): number {
  return placeOf(tenant, Number(request >> 32n), Number(request & 0xffffffffn))
}

function isOf({ asked, high, low }: Exchange, tenant: number, h: number, l: number): boolean {
  return low === l && high === h && asked.tenant === tenant
}
