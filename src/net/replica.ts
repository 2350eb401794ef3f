// Owns the engine's end of the datagram protocol: which request a frame belongs to, when each has
// its turn, and how much memory unfinished prompts may take. The ingress program has let every
// datagram in by its MAC and cookie; what is in it is checked here. No I/O, no clock of its own.

import { Exchange, type ExchangeWorld } from './exchange.ts'
import { type FrameLayout, layoutOf, ReturnPath } from './frame.ts'
import { HEADER_BYTES, MESSAGE_TYPES, readHeader } from './protocol.ts'
import type { SipKey } from './siphash.ts'

export interface ReplicaWorld extends Omit<ExchangeWorld, 'reserve'> {
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

/** How often those that only linger are looked at. */
const LOOK_MS = 250

export class Replica {
  private readonly exchanges = new Map<string, Exchange>()
  /** Everything was said and heard; they only linger, and many may. */
  private readonly resting = new Map<string, Exchange>()
  private lookMs = -Infinity
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
    this.world = { ...world, reserve: (tenant, bytes) => this.reserve(tenant, bytes) }
  }

  /** Requests that are remembered, whether they run or only linger. */
  get size(): number {
    return this.exchanges.size + this.resting.size
  }

  /** Nothing is left to say or to hear. */
  get settled(): boolean {
    return this.exchanges.values().every((exchange) => exchange.settled)
  }

  /** A frame that the ingress program redirected here. */
  take(view: DataView, at: number, bytes: number): void {
    const layout = layoutOf(view, at, bytes)
    if (!layout) return
    const data = new DataView(view.buffer, view.byteOffset + layout.data, layout.dataBytes)
    const key = this.keys(data.getUint32(8), data.getUint16(12))
    const header = key && readHeader(data, key)
    if (!header) return
    const id = `${header.tenant}:${header.request}`
    let exchange = this.exchanges.get(id) ?? this.wake(id)
    if (!exchange) {
      // What comes late after the end, or an answer to nothing. CANCEL may come before any DATA.
      const { type } = header
      if (type !== MESSAGE_TYPES.data && type !== MESSAGE_TYPES.cancel) return
      if (header.promptBytes === 0) return
      exchange = new Exchange(header, key, new ReturnPath(view, at, layout), this.world)
      this.exchanges.set(id, exchange)
      this.world.claimed(header.tenant, header.request)
    }
    exchange.take(header, payloadOf(view, layout))
  }

  /** Sends what is due. Returns when there is more to do if nothing arrives; undefined if never. */
  turn(): number | undefined {
    let next: number | undefined
    for (const [id, exchange] of this.exchanges) {
      const at = exchange.turn()
      if (at === undefined || exchange.settled) this.exchanges.delete(id)
      if (at === undefined) continue
      if (exchange.settled) this.resting.set(id, exchange)
      else if (next === undefined || at < next) next = at
    }
    if (this.resting.size === 0) return next
    const now = this.world.now()
    if (now >= this.lookMs) {
      this.lookMs = now + LOOK_MS
      for (const [id, exchange] of this.resting) {
        if (exchange.turn() === undefined) this.resting.delete(id)
      }
    }
    return Math.min(this.lookMs, next ?? Infinity)
  }

  /** A late repeat has come for it. */
  private wake(id: string): Exchange | undefined {
    const exchange = this.resting.get(id)
    if (!exchange) return undefined
    this.resting.delete(id)
    this.exchanges.set(id, exchange)
    return exchange
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

function payloadOf(view: DataView, { data, dataBytes }: FrameLayout): Uint8Array {
  return new Uint8Array(
    view.buffer,
    view.byteOffset + data + HEADER_BYTES,
    dataBytes - HEADER_BYTES,
  )
}
