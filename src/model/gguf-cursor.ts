// Owns the primitive fields of GGUF: little-endian integers and length-prefixed UTF-8, each read
// with its name at hand, so that an error says which field at which byte.

import { isUtf8 } from 'node:buffer'
import { LatticeError } from '../errors.ts'
import { type ByteSource, Window } from './byte-source.ts'

/** The error for a field that cannot be right. */
export function invalid(
  source: ByteSource,
  field: string,
  offset: number,
  what: string,
): LatticeError {
  return new LatticeError('gguf_invalid', `${source.name}: ${field} at byte ${offset} ${what}.`, {
    todo: 'Download the file again (`lattice rm`, then `lattice pull`), or take another one.',
    details: { field, offset },
  })
}

/** Reads fields one after the other; throws `gguf_invalid` where the file ends too early. */
export class GgufCursor {
  private readonly window: Window

  constructor(source: ByteSource) {
    this.window = new Window(source)
  }

  get source(): ByteSource {
    return this.window.source
  }

  get offset(): number {
    return this.window.offset
  }

  get remaining(): number {
    return this.window.remaining
  }

  u8(field: string): number {
    const at = this.take(1, field)
    return this.window.bytes.readUInt8(at)
  }

  u32(field: string): number {
    const at = this.take(4, field)
    return this.window.bytes.readUInt32LE(at)
  }

  u64(field: string): bigint {
    const at = this.take(8, field)
    return this.window.bytes.readBigUInt64LE(at)
  }

  /** The next bytes, as a copy that may be kept. */
  copy(byteLength: number, field: string): Uint8Array<ArrayBuffer> {
    const at = this.take(byteLength, field)
    const bytes = new Uint8Array(byteLength)
    bytes.set(this.window.bytes.subarray(at, at + byteLength))
    return bytes
  }

  /** A 64-bit length and that many bytes of UTF-8. */
  string(field: string, maxBytes: number): string {
    const offset = this.offset
    const length = this.u64(field)
    if (length > BigInt(this.remaining)) {
      const what = `has a length of ${length}, but only ${this.remaining} bytes follow`
      throw invalid(this.source, field, offset, what)
    }
    if (length > BigInt(maxBytes)) {
      const what = `has a length of ${length}, more than the ${maxBytes} bytes that may be`
      throw invalid(this.source, field, offset, what)
    }
    const size = Number(length)
    const at = this.take(size, field)
    const text = this.window.bytes.toString('utf8', at, at + size)
    // Decoding turns bad bytes into U+FFFD; only then is the slow question worth asking.
    if (text.includes('\ufffd') && !isUtf8(this.window.bytes.subarray(at, at + size))) {
      throw invalid(this.source, field, offset, 'is not UTF-8')
    }
    return text
  }

  /** Index of the next bytes in the window; reading it first matters, as taking may slide it. */
  private take(byteLength: number, field: string): number {
    const { window } = this
    if (!window.has(byteLength)) {
      const what = `needs ${byteLength} bytes, but the file ends after ${window.remaining}`
      throw invalid(window.source, field, window.offset, what)
    }
    const at = window.at
    window.at += byteLength
    return at
  }
}
