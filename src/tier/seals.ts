// Owns sealing columns, each with a nonce of its own and bound to its place: what comes back from
// disk is what went there, or is refused.

import { assert } from '../assert.ts'
import { AesGcm, NONCE_BYTES, TAG_BYTES } from '../ffi/aes-gcm.ts'
import { columnBytes, SEAL_WORDS, type TierShared } from './shared.ts'

/** Keys of a file: columns sealed earlier may have others than those sealed now. */
export interface SealKeys {
  /** Addresses of 32 bytes each. */
  addresses: readonly number[]
  /** Which of them seals. */
  current: number
  /** 16 bytes that are sealed in with every column, the file's own. */
  fileId: Uint8Array
}

/** The current key's nonces are a counter; a key is only ever current once. */
export class ColumnSeals {
  private readonly shared: TierShared
  private readonly keys: SealKeys
  private readonly ciphers: (AesGcm | undefined)[] = []
  private readonly bytes: number
  private readonly nonce = Buffer.alloc(NONCE_BYTES)
  /** The file, the place, the size of a column. */
  private readonly associated = Buffer.alloc(24)
  private readonly tag = new Uint32Array(TAG_BYTES / 4)
  private readonly tagBytes = new Uint8Array(this.tag.buffer)
  private counter = 0

  constructor(shared: TierShared, keys: SealKeys) {
    this.shared = shared
    this.keys = keys
    this.bytes = columnBytes(shared.geometry)
    assert(keys.fileId.length === 16, 'a file has 16 bytes of name')
    this.associated.set(keys.fileId)
    this.associated.writeUInt32LE(this.bytes, 20)
  }

  /** Encrypts a column in place, for a place. */
  seal(address: number, place: number): void {
    const { seals } = this.shared
    const { current } = this.keys
    const at = place * SEAL_WORDS
    this.prepare(place, this.counter % 2 ** 32, Math.floor(this.counter / 2 ** 32))
    this.cipher(current).seal(address, this.bytes, this.nonce, this.associated, this.tagBytes)
    seals[at] = this.counter % 2 ** 32
    seals[at + 1] = Math.floor(this.counter / 2 ** 32)
    seals[at + 2] = current
    seals[at + 3] = 1
    seals.set(this.tag, at + 4)
    this.counter++
  }

  /** Decrypts in place; false if it is not what was last sealed for this place. */
  open(address: number, place: number): boolean {
    const { seals } = this.shared
    const at = place * SEAL_WORDS
    if (seals[at + 3] !== 1) return false
    this.prepare(place, seals[at] ?? 0, seals[at + 1] ?? 0)
    this.tag.set(seals.subarray(at + 4, at + SEAL_WORDS))
    const cipher = this.cipher(seals[at + 2] ?? 0)
    return cipher.open(address, this.bytes, this.nonce, this.associated, this.tagBytes)
  }

  close(): void {
    for (const cipher of this.ciphers) cipher?.close()
  }

  private prepare(place: number, low: number, high: number): void {
    this.nonce.writeUInt32LE(low, 0)
    this.nonce.writeUInt32LE(high, 4)
    this.associated.writeUInt32LE(place, 16)
  }

  private cipher(key: number): AesGcm {
    const address = this.keys.addresses[key]
    assert(address !== undefined, `key ${key} exists`)
    return (this.ciphers[key] ??= new AesGcm(address))
  }
}
