// Owns user space's side of the table of granted requests, which the program enters (bpf/requests.h
// has the other side): to find one, to end it, to forget it. It lies in memory that both map.

import { BUCKET, REQUEST, REQUEST_STATES } from './ingress-maps.ts'

const WORD = 0xffff_ffff_ffff_ffffn

/** Where a request lies in the table; of no use once it is forgotten. */
export type RequestAt = number

export interface GrantedRequest {
  tenant: number
  request: bigint
  grantedNs: bigint
  /** From this ktime on its number may be forgotten. */
  expiresNs: bigint
  hasEnded: boolean
  /** Index of the replica that it was granted for. */
  replica: number
  chargedTokens: number
}

/** Buckets that hold so many: 8 of 14 slots are taken on average when they are all there. */
export function bucketsFor(requests: number): number {
  return Math.ceil((requests * 7) / (4 * BUCKET.slots)) + BUCKET.probes - 1
}

export class GrantedRequests {
  private readonly view: DataView
  private readonly words: Int32Array
  private readonly buckets: number
  private readonly keys: readonly [bigint, bigint]

  /**
   * @param memory of the map
   * @param keys what the hash of the table begins with
   */
  constructor(memory: ArrayBuffer, buckets: number, keys: readonly [bigint, bigint]) {
    this.view = new DataView(memory)
    this.words = new Int32Array(memory)
    this.buckets = buckets
    this.keys = keys
  }

  find(tenant: number, request: bigint): RequestAt | undefined {
    const { bucket, tag } = this.placeOf(tenant, request)
    for (let i = bucket; i < bucket + BUCKET.probes; i++) {
      const base = i * BUCKET.bytes
      for (let slot = 0; slot < BUCKET.slots; slot++) {
        if (this.words[(base >> 2) + slot] !== tag) continue
        const at = base + BUCKET.requests + slot * REQUEST.bytes
        const isIt =
          this.view.getUint32(at + REQUEST.tenant, true) === tenant &&
          this.view.getBigUint64(at + REQUEST.request) === request
        if (isIt && this.words[(at + REQUEST.state) >> 2] !== REQUEST_STATES.entering) return at
      }
      if (this.view.getUint32(base + BUCKET.overflowed, true) === 0) return undefined
    }
    return undefined
  }

  read(at: RequestAt): GrantedRequest {
    const { view } = this
    return {
      tenant: view.getUint32(at + REQUEST.tenant, true),
      request: view.getBigUint64(at + REQUEST.request),
      grantedNs: view.getBigUint64(at + REQUEST.grantedNs, true),
      expiresNs: view.getBigUint64(at + REQUEST.expiresNs, true),
      hasEnded: view.getUint32(at + REQUEST.state, true) === REQUEST_STATES.ended,
      replica: view.getUint32(at + REQUEST.route) - 1,
      chargedTokens: view.getUint32(at + REQUEST.chargedTokens, true),
    }
  }

  /** False if it had ended before. */
  end(at: RequestAt): boolean {
    const { runs, ended } = REQUEST_STATES
    return Atomics.compareExchange(this.words, (at + REQUEST.state) >> 2, runs, ended) === runs
  }

  /** Its number may be used again. */
  forget(at: RequestAt): void {
    // In this order: who takes the slot finds nothing that looks entered.
    Atomics.store(this.words, (at + REQUEST.state) >> 2, REQUEST_STATES.entering)
    const inBucket = at % BUCKET.bytes
    const slot = (inBucket - BUCKET.requests) / REQUEST.bytes
    Atomics.store(this.words, ((at - inBucket) >> 2) + slot, 0)
  }

  /** Those in one of so many parts of the table. */
  *part(index: number, parts: number): Generator<RequestAt> {
    const each = Math.ceil(this.buckets / parts)
    const end = Math.min(this.buckets, (index + 1) * each)
    for (let bucket = index * each; bucket < end; bucket++) {
      const base = bucket * BUCKET.bytes
      for (let slot = 0; slot < BUCKET.slots; slot++) {
        if (this.words[(base >> 2) + slot] === 0) continue
        const at = base + BUCKET.requests + slot * REQUEST.bytes
        if (this.words[(at + REQUEST.state) >> 2] !== REQUEST_STATES.entering) yield at
      }
    }
  }

  /** As `place_of` of the program. */
  private placeOf(tenant: number, request: bigint): { bucket: number; tag: number } {
    swap.setBigUint64(0, request)
    // As it comes over the wire.
    const word = swap.getBigUint64(0, true)
    let hash = ((word ^ this.keys[0]) * (this.keys[1] | 1n)) & WORD
    hash ^= hash >> 32n
    hash = ((hash + BigInt(tenant)) * 0x9e37_79b9_7f4a_7c15n) & WORD
    hash ^= hash >> 32n
    const bucket = ((hash >> 32n) * BigInt(this.buckets - (BUCKET.probes - 1))) >> 32n
    return { bucket: Number(bucket), tag: Number(BigInt.asIntN(32, hash | 1n)) }
  }
}

const swap = new DataView(new ArrayBuffer(8))
