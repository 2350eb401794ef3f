// Owns keys in memory that is locked (never swapped, never in a core dump) and zeroed at the end.

import { hkdfSync, randomFillSync } from 'node:crypto'
import { assert } from '../assert.ts'
import { KEY_BYTES } from '../ffi/aes-gcm.ts'
import { lockMemory, mapAnonymous, unmap, viewMemory } from '../ffi/libc.ts'

const PAGE_BYTES = 4096

export class Keys {
  readonly address: number
  private readonly bytes: number
  private readonly memory: Uint8Array<ArrayBuffer>
  private count = 0

  /** @throws LatticeError `os_call_failed` if the memory cannot be locked */
  constructor(capacity: number) {
    this.bytes = Math.ceil((capacity * KEY_BYTES) / PAGE_BYTES) * PAGE_BYTES
    this.address = mapAnonymous(this.bytes)
    lockMemory(this.address, this.bytes)
    this.memory = new Uint8Array(viewMemory(this.address, this.bytes))
  }

  /** A key that exists nowhere else. @returns its number */
  random(): number {
    randomFillSync(this.memory, this.next(), KEY_BYTES)
    return this.count++
  }

  /** A key of a secret for one purpose and one salt (HKDF with SHA-256). @returns its number */
  derive(secret: Uint8Array, salt: Uint8Array, purpose: string): number {
    const derived = new Uint8Array(hkdfSync('sha256', secret, salt, purpose, KEY_BYTES))
    this.memory.set(derived, this.next())
    derived.fill(0)
    return this.count++
  }

  addressOf(key: number): number {
    assert(key < this.count, `key ${key} exists`)
    return this.address + key * KEY_BYTES
  }

  close(): void {
    this.memory.fill(0)
    unmap(this.address, this.bytes)
  }

  private next(): number {
    const at = this.count * KEY_BYTES
    assert(at < this.bytes, 'there is room for another key')
    return at
  }
}
