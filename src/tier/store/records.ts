// Owns what a store's log says, as bytes: a prefix was kept, a prefix was dropped. A prefix goes on
// where its parent ends, and so does the list of its columns.

import { TAG_BYTES } from '../../ffi/aes-gcm.ts'
import type { StoredPrefix } from '../../kv/tier.ts'
import { SALT_BYTES } from './frames.ts'

/** What proves that a place holds what was written there. */
export interface PlaceSeal {
  counter: number
  salt: Uint8Array
  tag: Uint8Array
}

export type StoreRecord =
  | { kind: 'put'; prefix: StoredPrefix; seals: PlaceSeal[] }
  | { kind: 'remove'; id: number }

const PUT = 1
const REMOVE = 2
const SEAL_BYTES = 8 + 2 + TAG_BYTES

export function encodePut(prefix: StoredPrefix, seals: readonly PlaceSeal[]): Buffer {
  const salts = new Map<string, number>()
  for (const { salt } of seals) salts.set(hex(salt), salts.get(hex(salt)) ?? salts.size)
  const tenant = Buffer.from(prefix.tenant)
  const { tokens, places } = prefix
  const bytes = 1 + 8 + 8 + 2 + tenant.length + 16 + 2 + salts.size * SALT_BYTES
  const out = Buffer.alloc(bytes + tokens.length * 4 + places.length * (4 + SEAL_BYTES))
  let at = out.writeUInt8(PUT, 0)
  at = out.writeBigUInt64LE(BigInt(prefix.id), at)
  at = out.writeBigUInt64LE(BigInt(prefix.parent), at)
  at = out.writeUInt16LE(tenant.length, at)
  at += tenant.copy(out, at)
  for (const count of [prefix.from, tokens.length, prefix.firstColumn, places.length]) {
    at = out.writeUInt32LE(count, at)
  }
  for (const token of tokens) at = out.writeInt32LE(token, at)
  at = out.writeUInt16LE(salts.size, at)
  for (const salt of salts.keys()) at += Buffer.from(salt, 'hex').copy(out, at)
  places.forEach((place, i) => {
    const seal = seals[i]!
    at = out.writeUInt32LE(place, at)
    at = out.writeBigUInt64LE(BigInt(seal.counter), at)
    at = out.writeUInt16LE(salts.get(hex(seal.salt)) ?? 0, at)
    at += Buffer.from(seal.tag).copy(out, at)
  })
  return out
}

export function encodeRemove(id: number): Buffer {
  const out = Buffer.alloc(9)
  out.writeBigUInt64LE(BigInt(id), out.writeUInt8(REMOVE, 0))
  return out
}

/** What was encoded. It was authenticated, so anything else is an error of ours. */
export function decode(bytes: Buffer): StoreRecord {
  let at = 1
  const take = (count: number) => (at += count) - count
  const u64 = () => Number(bytes.readBigUInt64LE(take(8)))
  const u32 = () => bytes.readUInt32LE(take(4))
  if (bytes[0] === REMOVE) return { kind: 'remove', id: u64() }
  const [id, parent] = [u64(), u64()]
  const tenantBytes = bytes.readUInt16LE(take(2))
  const tenantAt = take(tenantBytes)
  const tenant = bytes.toString('utf8', tenantAt, tenantAt + tenantBytes)
  const [from, tokenCount, firstColumn, placeCount] = [u32(), u32(), u32(), u32()]
  const tokens = Int32Array.from({ length: tokenCount }, () => bytes.readInt32LE(take(4)))
  const salts = Array.from({ length: bytes.readUInt16LE(take(2)) }, () => {
    return Uint8Array.from(bytes.subarray(take(SALT_BYTES), at))
  })
  const places = new Uint32Array(placeCount)
  const seals: PlaceSeal[] = []
  for (let i = 0; i < placeCount; i++) {
    places[i] = u32()
    const counter = u64()
    const salt = salts[bytes.readUInt16LE(take(2))]!
    seals.push({ counter, salt, tag: Uint8Array.from(bytes.subarray(take(TAG_BYTES), at)) })
  }
  const prefix = { id, parent, tenant, from, tokens, firstColumn, places }
  return { kind: 'put', prefix, seals }
}

function hex(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('hex')
}
