// Owns the frames of a store's log: each sealed on its own, so that one that was torn or changed is
// recognised and the others still count.
//
//   | magic 4 | bytes 4 | salt 16 | counter 8 | payload, encrypted | tag 16 | zeros up to 16 |
//
// The key is derived from the store's secret, its id and the salt, which each opening draws anew:
// so a counter makes nonces that never repeat. Frames lie at multiples of 16.

import { randomBytes } from 'node:crypto'
import { present } from '../../assert.ts'
import { AesGcm, NONCE_BYTES, TAG_BYTES } from '../../ffi/aes-gcm.ts'
import { mapAnonymous, unmap, viewMemory } from '../../ffi/libc.ts'
import type { Keys } from '../keys.ts'

export const SALT_BYTES = 16
export const FRAME_ALIGN = 16

const MAGIC = 0x46564b4c
const HEAD_BYTES = 32

/** No record comes near: a damaged length must not reserve memory. */
export const FRAME_PAYLOAD_MAX = 16 << 20

/** The keys of one store: of its frames and of its columns, by salt. */
export class StoreKeys {
  readonly keys: Keys
  readonly storeId: Uint8Array
  /** Of this opening. */
  readonly salt: Uint8Array
  private secret: Uint8Array | undefined
  private readonly frames = new Map<string, AesGcm>()
  private readonly columns = new Map<string, number>()
  private readonly salts: Uint8Array[] = []

  constructor(keys: Keys, secret: Uint8Array, storeId: Uint8Array) {
    this.keys = keys
    this.secret = secret
    this.storeId = storeId
    this.salt = randomBytes(SALT_BYTES)
  }

  /** The key of columns that were sealed under a salt. @returns its number */
  columnKey(salt: Uint8Array): number {
    return this.cached(this.columns, salt, () => {
      const key = this.derive(salt, 'lattice kv columns')
      this.salts[key] = salt.slice()
      return key
    })
  }

  /** The salt of a column's key. */
  saltOf(key: number): Uint8Array | undefined {
    return this.salts[key]
  }

  frameCipher(salt: Uint8Array): AesGcm {
    return this.cached(this.frames, salt, () => {
      return new AesGcm(this.keys.addressOf(this.derive(salt, 'lattice kv log')))
    })
  }

  derive(salt: Uint8Array, purpose: string): number {
    const secret = present(this.secret, 'the secret of keys that are still derived')
    return this.keys.derive(secret, Buffer.concat([this.storeId, salt]), purpose)
  }

  /** No more keys are derived. Those that were stay in `keys`. */
  close(): void {
    this.secret = undefined
    for (const cipher of this.frames.values()) cipher.close()
    this.frames.clear()
  }

  private cached<T>(map: Map<string, T>, salt: Uint8Array, make: () => T): T {
    const name = Buffer.from(salt).toString('hex')
    const found = map.get(name) ?? make()
    map.set(name, found)
    return found
  }
}

/** Seals frames, under one salt. */
export class FrameWriter {
  private readonly cipher: AesGcm
  private readonly storeId: Uint8Array
  private readonly salt: Uint8Array
  private counter = 0

  constructor(cipher: AesGcm, storeId: Uint8Array, salt: Uint8Array) {
    this.cipher = cipher
    this.storeId = storeId
    this.salt = salt
  }

  frame(payload: Uint8Array): Buffer {
    const bytes = frameBytes(payload.length)
    const address = mapAnonymous(bytes)
    const frame = Buffer.from(viewMemory(address, bytes))
    frame.writeUInt32LE(MAGIC, 0)
    frame.writeUInt32LE(payload.length, 4)
    frame.set(this.salt, 8)
    frame.writeBigUInt64LE(BigInt(this.counter++), 24)
    frame.set(payload, HEAD_BYTES)
    const head = frame.subarray(0, HEAD_BYTES)
    const tag = frame.subarray(HEAD_BYTES + payload.length, HEAD_BYTES + payload.length + TAG_BYTES)
    const associated = Buffer.concat([this.storeId, head])
    this.cipher.seal(address + HEAD_BYTES, payload.length, nonceOf(head), associated, tag)
    const result = Buffer.from(frame)
    unmap(address, bytes)
    return result
  }
}

export interface Scan {
  /** Every payload that is whole, in order. */
  payloads: { offset: number; bytes: number; payload: Buffer }[]
  /** Stretches that are no frame: torn, changed, or written over. */
  damaged: number
}

/** Reads all frames of a log, from a multiple of 16 on. */
export function scanFrames(log: Buffer, from: number, keys: StoreKeys): Scan {
  const scan: Scan = { payloads: [], damaged: 0 }
  let inDamage = false
  for (let at = from; at < log.length;) {
    const payload = openFrame(log.subarray(at), keys)
    if (payload) {
      const bytes = frameBytes(payload.length)
      scan.payloads.push({ offset: at, bytes, payload })
      at += bytes
      inDamage = false
    } else {
      if (!inDamage) scan.damaged++
      inDamage = true
      at += FRAME_ALIGN
    }
  }
  return scan
}

/** The payload of a frame that begins here, if one does. */
export function openFrame(log: Buffer, keys: StoreKeys): Buffer | undefined {
  if (log.length < HEAD_BYTES + TAG_BYTES || log.readUInt32LE(0) !== MAGIC) return undefined
  const bytes = log.readUInt32LE(4)
  if (bytes > FRAME_PAYLOAD_MAX || frameBytes(bytes) > log.length) return undefined
  const head = log.subarray(0, HEAD_BYTES)
  const cipher = keys.frameCipher(head.subarray(8, 8 + SALT_BYTES))
  const associated = Buffer.concat([keys.storeId, head])
  const tag = log.subarray(HEAD_BYTES + bytes, HEAD_BYTES + bytes + TAG_BYTES)
  const address = mapAnonymous(Math.max(1, bytes))
  const native = Buffer.from(viewMemory(address, Math.max(1, bytes)))
  native.set(log.subarray(HEAD_BYTES, HEAD_BYTES + bytes))
  const whole = cipher.open(address, bytes, nonceOf(head), associated, Uint8Array.from(tag))
  const payload = whole ? Buffer.from(native.subarray(0, bytes)) : undefined
  unmap(address, Math.max(1, bytes))
  return payload
}

export function frameBytes(payload: number): number {
  return Math.ceil((HEAD_BYTES + payload + TAG_BYTES) / FRAME_ALIGN) * FRAME_ALIGN
}

function nonceOf(head: Uint8Array): Buffer {
  const nonce = Buffer.alloc(NONCE_BYTES)
  nonce.set(head.subarray(24, 32))
  return nonce
}
