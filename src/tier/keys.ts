// Owns keys in memory that is locked (never swapped, never in a core dump) and zeroed at the end.

import { hkdfSync, randomFillSync } from 'node:crypto'
import { present } from '../assert.ts'
import { KEY_BYTES } from '../ffi/aes-gcm.ts'
import { lockMemory, mapAnonymous, unmap, viewMemory } from '../ffi/libc.ts'

const PAGE_BYTES = 4096
const KEYS_OF_PAGE = PAGE_BYTES / KEY_BYTES

export class Keys {
  /** By number: where a key lies. */
  readonly addresses: number[] = []
  private readonly pages: { address: number; memory: Uint8Array }[] = []

  /** A key that exists nowhere else. @returns its number */
  random(): number {
    randomFillSync(this.next())
    return this.addresses.length - 1
  }

  /** A key of a secret for one purpose and one salt (HKDF with SHA-256). @returns its number */
  derive(secret: Uint8Array, salt: Uint8Array, purpose: string): number {
    const derived = new Uint8Array(hkdfSync('sha256', secret, salt, purpose, KEY_BYTES))
    this.next().set(derived)
    derived.fill(0)
    return this.addresses.length - 1
  }

  addressOf(key: number): number {
    return present(this.addresses[key], `key ${key}`)
  }

  close(): void {
    for (const { address, memory } of this.pages.splice(0)) {
      memory.fill(0)
      unmap(address, PAGE_BYTES)
    }
  }

  /** Room for another key. @throws LatticeError `os_call_failed` if memory cannot be locked */
  private next(): Uint8Array {
    const count = this.addresses.length
    if (count % KEYS_OF_PAGE === 0) {
      const address = mapAnonymous(PAGE_BYTES)
      lockMemory(address, PAGE_BYTES)
      this.pages.push({ address, memory: new Uint8Array(viewMemory(address, PAGE_BYTES)) })
    }
    const { address, memory } = present(this.pages.at(-1), 'a page of keys')
    const at = (count % KEYS_OF_PAGE) * KEY_BYTES
    this.addresses.push(address + at)
    return memory.subarray(at, at + KEY_BYTES)
  }
}
