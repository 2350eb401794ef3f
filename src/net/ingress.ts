// Owns the control plane of ingress: it loads the program, tells it tenants, limits, replicas and
// published prefixes through shared memory, gives back what a request did not use, and reads the
// counters. It decides nothing about a packet; bpf/ingress.bpf.c does.

import { readFileSync } from 'node:fs'
import { LatticeError } from '../errors.ts'
import { NET_REQUESTS_DEFAULT, NET_REQUESTS_MAX } from '../limits.ts'
import { BpfObject, type BpfProgram, possibleCpus } from '../ffi/libbpf.ts'
import { MapSweep } from '../ffi/map-sweep.ts'
import {
  ADDRESSES_MAX,
  CONTROL,
  COUNTERS,
  COUNTERS_BY_CODE,
  COUNTERS_MAX,
  REPLICA,
  REPLICAS_MAX,
  REQUEST,
  REQUEST_KEY,
  TENANT,
  TUNABLES,
} from './ingress-maps.ts'
import { MESSAGE_CODES, modelHash, PROTOCOL_PORT, TENANTS_MAX } from './protocol.ts'

export interface IngressTunables {
  /** UDP port of the protocol. */
  port: number
  /** How far a HELLO's time may be off, and how long its number stays taken. */
  windowMs: number
  /** Fragments that a client may have in flight. */
  credit: number
  /** Requests that are remembered: as many as are granted within a window, and those that run. */
  requests: number
  /** One decision in so many becomes an event: a power of two, or 0 for none. */
  sampleEvery: number
  /** Limits the new connections of a plain TCP port as well; off unless given. */
  syn: SynLimits | undefined
}

export interface SynLimits {
  port: number
  /** Of one source: an IPv4 address, or 64 bits of IPv6. */
  source: SynRate | undefined
  /** Of all together, counted after the source's. */
  total: SynRate | undefined
}

export interface SynRate {
  /** Connections that may be opened. */
  perSecond: number
  /** How many at once after a rest. */
  burst: number
}

export const INGRESS_DEFAULTS: IngressTunables = {
  port: PROTOCOL_PORT,
  windowMs: 30_000,
  credit: 64,
  requests: NET_REQUESTS_DEFAULT,
  sampleEvery: 0,
  syn: undefined,
}

export interface TenantLimits {
  /** Two keys of 16 bytes; the second one may be the first while none is being replaced. */
  keys: readonly [Uint8Array, Uint8Array]
  /** At least 10: prices are kept in whole ns / 1024. */
  tokensPerSecond: number
  /** How many tokens may be taken at once after a rest. */
  burstTokens: number
  maxRunning: number
}

/** A granted prompt of which nothing has come for so long is not coming. */
const UNCLAIMED_NS = 10_000_000_000

export type IngressCounters = Record<string, number>

export interface TenantUse {
  running: number
  granted: number
  rejected: number
  /** Of all time, less what was given back. */
  chargedTokens: number
}

export class Ingress {
  readonly program: BpfProgram
  readonly object: BpfObject
  /** Where `expire` has come to. */
  private sweep: MapSweep | undefined
  private readonly tenants: DataView
  private readonly control: DataView
  private readonly atomics: { tenants: BigInt64Array; running: Int32Array; control: Int32Array }

  /** @throws LatticeError as `BpfObject` does */
  constructor(elf: Uint8Array, tunables: Partial<IngressTunables> = {}) {
    const chosen = { ...INGRESS_DEFAULTS, ...tunables }
    assertPowerOfTwo(chosen.sampleEvery)
    if (!(chosen.requests >= 1 && chosen.requests <= NET_REQUESTS_MAX)) {
      throw new LatticeError('invalid_request', `${chosen.requests} requests to remember.`, {
        todo: `Use 1 to ${NET_REQUESTS_MAX}: each takes some 130 bytes of the kernel's memory.`,
      })
    }
    const tune = (rodata: Uint8Array): void => {
      const view = new DataView(rodata.buffer, rodata.byteOffset)
      view.setUint16(TUNABLES.port, chosen.port, true)
      view.setBigUint64(TUNABLES.windowUs, BigInt(chosen.windowMs) * 1000n, true)
      view.setBigUint64(TUNABLES.credit, BigInt(chosen.credit), true)
      view.setUint32(TUNABLES.sampleEvery, chosen.sampleEvery, true)
      if (chosen.syn) tuneSyn(view, chosen.syn)
    }
    this.object = new BpfObject(elf, tune, { requests: chosen.requests })
    this.program = this.object.program('ingress')
    const tenants = this.object.map('tenants').view()
    const control = this.object.map('controls').view()
    this.tenants = new DataView(tenants)
    this.control = new DataView(control)
    this.atomics = {
      tenants: new BigInt64Array(tenants),
      running: new Int32Array(tenants),
      control: new Int32Array(control),
    }
    crypto.getRandomValues(new Uint8Array(control, CONTROL.cookieKey, 16))
    this.syncClock()
  }

  /** The compiled program that comes with the package. */
  static load(tunables?: Partial<IngressTunables>): Ingress {
    return new Ingress(readFileSync(new URL('../../bpf/ingress.o', import.meta.url)), tunables)
  }

  /** Tells the program what time it is; call it every few seconds, clocks drift and are set. */
  syncClock(): void {
    const offset = BigInt(Math.round((performance.timeOrigin + performance.now()) * 1000))
    const ktimeUs = process.hrtime.bigint() / 1000n
    this.control.setBigInt64(CONTROL.clockOffsetUs, offset - ktimeUs, true)
  }

  /** @throws LatticeError `invalid_request` for numbers out of bounds */
  setTenant(index: number, limits: TenantLimits): void {
    const { keys, tokensPerSecond, burstTokens, maxRunning } = limits
    if (!Number.isInteger(index) || index < 0 || index >= TENANTS_MAX) {
      throw new LatticeError('invalid_request', `Tenant ${index} is not one of ${TENANTS_MAX}.`)
    }
    if (!(tokensPerSecond >= 10 && tokensPerSecond <= 1e9)) {
      throw new LatticeError('invalid_request', `A rate of ${tokensPerSecond} tokens a second.`, {
        todo: 'Use 10 to 1,000,000,000.',
      })
    }
    const at = index * TENANT.bytes
    keys.forEach((key, i) => new Uint8Array(this.tenants.buffer).set(key, at + 16 * i))
    const price = BigInt(Math.round((1e9 * 1024) / tokensPerSecond))
    const burstNs = (BigInt(Math.round(burstTokens)) * price) >> 10n
    this.tenants.setBigUint64(at + TENANT.burstNs, burstNs, true)
    this.tenants.setUint32(at + TENANT.liveMax, maxRunning, true)
    // Last: from here on it exists.
    this.tenants.setBigUint64(at + TENANT.nsPerToken1024, price, true)
  }

  removeTenant(index: number): void {
    this.tenants.setBigUint64(index * TENANT.bytes + TENANT.nsPerToken1024, 0n, true)
  }

  setMaxRunning(requests: number): void {
    this.control.setUint32(CONTROL.liveMax, requests, true)
  }

  /**
   * The addresses that the program answers for: datagrams to others go on to where they go.
   * @param addresses of 16 bytes, IPv4 as ::ffff:a.b.c.d; none is any
   * @throws LatticeError `invalid_request` for more than 16
   */
  setAddresses(addresses: readonly Uint8Array[]): void {
    if (addresses.length > ADDRESSES_MAX) {
      throw new LatticeError('invalid_request', `${addresses.length} addresses to answer for.`, {
        todo: `The program knows ${ADDRESSES_MAX}: remove some from the interface.`,
      })
    }
    const four = addresses.filter(isMapped)
    const six = addresses.filter((address) => !isMapped(address))
    const bytes = new Uint8Array(this.control.buffer)
    for (let i = 0; i < ADDRESSES_MAX; i++) {
      bytes.set(four[i]?.subarray(12) ?? new Uint8Array(4), CONTROL.address4 + 4 * i)
      bytes.set(six[i] ?? new Uint8Array(16), CONTROL.address6 + 16 * i)
    }
    this.control.setUint32(CONTROL.addresses, addresses.length, true)
  }

  /** The receive queues that are answered on; what comes in on others goes on. None is all. */
  setQueues(queues: readonly number[]): void {
    const bits = queues.reduce((all, queue) => all | (1n << BigInt(queue)), 0n)
    this.control.setBigUint64(CONTROL.queues, bits, true)
  }

  /** @param model its name; undefined takes the replica out of the choice */
  setReplica(index: number, model: string | undefined): void {
    if (!Number.isInteger(index) || index < 0 || index >= REPLICAS_MAX) {
      throw new LatticeError('invalid_request', `Replica ${index} is not one of ${REPLICAS_MAX}.`)
    }
    const at = CONTROL.replicas + index * REPLICA.bytes
    if (model !== undefined) this.control.setUint32(at + REPLICA.model, modelHash(model), true)
    this.control.setUint32(at + REPLICA.ready, model === undefined ? 0 : 1, true)
  }

  /** Says how much else a replica has to do: requests of which the program knows nothing. */
  setOtherLoad(index: number, requests: number): void {
    this.control.setUint32(CONTROL.replicas + index * REPLICA.bytes + REPLICA.other, requests, true)
  }

  /** Puts an AF_XDP socket into the map that DATA is redirected by. */
  setRing(index: number, fd: number): void {
    const [key, value] = [new DataView(new ArrayBuffer(4)), new DataView(new ArrayBuffer(4))]
    key.setUint32(0, index, true)
    value.setInt32(0, fd, true)
    this.object.map('rings').update(new Uint8Array(key.buffer), new Uint8Array(value.buffer))
  }

  /** Says which replicas hold a prefix (a bit each); none forgets it. */
  publish(hash: bigint, replicas: bigint): void {
    const [key, value] = [new DataView(new ArrayBuffer(8)), new DataView(new ArrayBuffer(8))]
    key.setBigUint64(0, hash)
    value.setBigUint64(0, replicas, true)
    const map = this.object.map('prefixes')
    if (replicas === 0n) map.delete(new Uint8Array(key.buffer))
    else map.update(new Uint8Array(key.buffer), new Uint8Array(value.buffer))
  }

  /**
   * A granted request has ended: its places are free, and what it was charged beyond `usedTokens`
   * goes back to its tenant. Its number stays taken until its window is over.
   * @returns false if no such request runs
   */
  finish(tenant: number, request: bigint, usedTokens: number): boolean {
    const key = requestKey(tenant, request)
    const bytes = new Uint8Array(REQUEST.bytes)
    const map = this.object.map('requests')
    const value = new DataView(bytes.buffer)
    if (!map.lookup(key, bytes) || value.getUint32(REQUEST.ended, true) !== 0) return false
    value.setUint32(REQUEST.ended, 1, true)
    map.update(key, bytes)
    const replica = value.getUint32(REQUEST.route) - 1
    const at = (CONTROL.replicas + replica * REPLICA.bytes + REPLICA.live) >> 2
    Atomics.sub(this.atomics.control, at, 1)
    Atomics.sub(this.atomics.control, CONTROL.live >> 2, 1)
    Atomics.sub(this.atomics.running, (tenant * TENANT.bytes + TENANT.live) >> 2, 1)
    const unused = value.getUint32(REQUEST.chargedTokens, true) - usedTokens
    if (unused <= 0) return true
    const price = this.tenants.getBigUint64(tenant * TENANT.bytes + TENANT.nsPerToken1024, true)
    const refund = (BigInt(unused) * price) >> 10n
    const word = (tenant * TENANT.bytes) >> 3
    Atomics.sub(this.atomics.tenants, word + (TENANT.fullAtNs >> 3), refund)
    Atomics.sub(this.atomics.tenants, word + (TENANT.chargedTokens >> 3), BigInt(unused))
    return true
  }

  /**
   * Ends requests that were granted but whose prompt never came, and forgets ended ones whose
   * number nobody can use any more.
   * @param isClaimed whether a replica will finish it
   * @param now ktime
   * @param most how many are looked at; the next call goes on from there
   * @returns how many were forgotten
   */
  expire(
    isClaimed: (tenant: number, request: bigint) => boolean = () => false,
    now = process.hrtime.bigint(),
    most = Infinity,
  ): number {
    const map = this.object.map('requests')
    const nowNs = Number(now)
    const sweep = (this.sweep ??= new MapSweep(map))
    let count = 0
    for (let looked = 0; looked < most; looked++) {
      if (!sweep.next()) {
        this.sweep = undefined
        break
      }
      const { keys, keyAt, values, valueAt } = sweep
      if (values.getUint32(valueAt + REQUEST.ended, true) !== 0) {
        if (timeAt(values, valueAt + REQUEST.expiresNs) >= nowNs) continue
        if (map.delete(new Uint8Array(keys.buffer, keyAt, REQUEST_KEY.bytes))) count++
        continue
      }
      if (nowNs - timeAt(values, valueAt + REQUEST.grantedNs) < UNCLAIMED_NS) continue
      const tenant = keys.getUint32(keyAt + REQUEST_KEY.tenant, true)
      const request = keys.getBigUint64(keyAt + REQUEST_KEY.request)
      if (!isClaimed(tenant, request)) this.finish(tenant, request, 0)
    }
    return count
  }

  /** `expire` has more to look at. */
  get isSweeping(): boolean {
    return this.sweep !== undefined
  }

  /** Summed over CPUs; rejections also by code. */
  counters(): IngressCounters {
    const bytes = new Uint8Array(possibleCpus() * COUNTERS_MAX * 8)
    this.object.map('counts').lookup(new Uint8Array(4), bytes)
    const words = new BigUint64Array(bytes.buffer)
    const sum = (index: number) => {
      let total = 0n
      for (let i = index; i < words.length; i += COUNTERS_MAX) total += words[i] ?? 0n
      return Number(total)
    }
    const counters: IngressCounters = {}
    COUNTERS.forEach((name, i) => (counters[name] = sum(i)))
    for (const [name, code] of Object.entries(MESSAGE_CODES)) {
      const index = COUNTERS_BY_CODE + code - MESSAGE_CODES.version
      if (code >= MESSAGE_CODES.version && !OF_ENGINE.has(code)) counters[name] = sum(index)
    }
    return counters
  }

  /** Requests that were granted and have not ended. */
  get running(): number {
    return this.control.getUint32(CONTROL.live, true)
  }

  /** Whether a replica can be chosen, those of it, and what else it has to do. */
  replica(index: number): { ready: boolean; running: number; others: number } {
    const at = CONTROL.replicas + index * REPLICA.bytes
    return {
      ready: this.control.getUint32(at + REPLICA.ready, true) !== 0,
      running: this.control.getUint32(at + REPLICA.live, true),
      others: this.control.getUint32(at + REPLICA.other, true),
    }
  }

  /** What a tenant has and had. */
  use(index: number): TenantUse {
    const at = index * TENANT.bytes
    const count = (field: number) => Number(this.tenants.getBigUint64(at + field, true))
    return {
      running: this.tenants.getUint32(at + TENANT.live, true),
      granted: count(TENANT.granted),
      rejected: count(TENANT.rejected),
      chargedTokens: count(TENANT.chargedTokens),
    }
  }

  /** Nothing of this may be used afterwards. */
  close(): void {
    this.object.close()
  }
}

/** Said by END only, of which the program knows nothing. */
const OF_ENGINE: ReadonlySet<number> = new Set([
  MESSAGE_CODES.context,
  MESSAGE_CODES.prompt,
  MESSAGE_CODES.replica_lost,
])

/** @throws LatticeError `invalid_request` for numbers out of bounds */
function tuneSyn(rodata: DataView, { port, source, total }: SynLimits): void {
  rodata.setUint16(TUNABLES.synPort, port, true)
  const set = (rate: SynRate | undefined, gapAt: number, burstAt: number) => {
    if (!rate) return
    const { perSecond, burst } = rate
    if (!(perSecond >= 0.01 && perSecond <= 1e7 && burst >= 1 && burst <= 1e6)) {
      throw new LatticeError(
        'invalid_request',
        `${perSecond} connections a second, ${burst} once.`,
        {
          todo: 'Use 0.01 to 10,000,000 a second, and a burst of 1 to 1,000,000.',
        },
      )
    }
    const gapNs = BigInt(Math.round(1e9 / perSecond))
    rodata.setBigUint64(gapAt, gapNs, true)
    rodata.setBigUint64(burstAt, gapNs * BigInt(Math.round(burst)), true)
  }
  set(source, TUNABLES.synSourceNs, TUNABLES.synSourceBurstNs)
  set(total, TUNABLES.synTotalNs, TUNABLES.synTotalBurstNs)
}

/** @throws LatticeError `invalid_request` */
function assertPowerOfTwo(sampleEvery: number): void {
  const isFine = Number.isInteger(sampleEvery) && sampleEvery >= 0 && sampleEvery <= 1 << 30
  if (isFine && (sampleEvery & (sampleEvery - 1)) === 0) return
  throw new LatticeError('invalid_request', `One decision in ${sampleEvery} cannot be told of.`, {
    todo: 'Use a power of two up to 2^30, or 0 for none.',
  })
}

/** ::ffff:a.b.c.d */
function isMapped(address: Uint8Array): boolean {
  return address.every((byte, i) => i > 11 || byte === (i < 10 ? 0 : 255))
}

/** Thousands are read a second: a rounded number does, a big integer each would be garbage. */
function timeAt(view: DataView, at: number): number {
  return view.getUint32(at + 4, true) * 2 ** 32 + view.getUint32(at, true)
}

function requestKey(tenant: number, request: bigint): Uint8Array {
  const key = new DataView(new ArrayBuffer(REQUEST_KEY.bytes))
  // As it comes over the wire.
  key.setBigUint64(REQUEST_KEY.request, request)
  key.setUint32(REQUEST_KEY.tenant, tenant, true)
  return new Uint8Array(key.buffer)
}
