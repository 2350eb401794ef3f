// Owns memory that JavaScript fills in and foreign code reads, or the other way round: one buffer
// whose address is a number. Calls that take their arguments from a block cost no conversions.

import koffi from 'koffi'

/** Zeroed memory at a fixed address, for as long as the block is referred to. */
export class NativeBlock {
  readonly address: number
  readonly bytes: Uint8Array
  readonly u32: Uint32Array
  readonly i32: Int32Array
  readonly f32: Float32Array
  readonly u64: BigUint64Array

  constructor(byteLength: number) {
    const rounded = Math.ceil(byteLength / 8) * 8
    // 64 bytes more, so that the address can be aligned to what tensor maps ask for.
    const buffer = new ArrayBuffer(rounded + 64)
    const start = addressOf(buffer)
    const offset = (64 - (start % 64)) % 64
    this.address = start + offset
    this.bytes = new Uint8Array(buffer, offset, rounded)
    this.u32 = new Uint32Array(buffer, offset, rounded / 4)
    this.i32 = new Int32Array(buffer, offset, rounded / 4)
    this.f32 = new Float32Array(buffer, offset, rounded / 4)
    this.u64 = new BigUint64Array(buffer, offset, rounded / 8)
  }

  /** Writes an address or a count below 2^53 at a multiple of 8 bytes. */
  setNumber(offset: number, value: number): void {
    this.u32[offset / 4] = value >>> 0
    this.u32[offset / 4 + 1] = Math.floor(value / 2 ** 32)
  }

  /** Reads what `setNumber` wrote, or what foreign code left there. */
  number(offset: number): number {
    return (this.u32[offset / 4] ?? 0) + (this.u32[offset / 4 + 1] ?? 0) * 2 ** 32
  }
}

/** Where a buffer or a view of one lies. The caller keeps it alive while foreign code uses it. */
export function addressOf(memory: ArrayBufferLike | ArrayBufferView): number {
  return Number(koffi.address(memory))
}

/** A string for foreign code: UTF-8, ended by a zero byte. */
export function cString(text: string): NativeBlock {
  const encoded = new TextEncoder().encode(text)
  const block = new NativeBlock(encoded.length + 1)
  block.bytes.set(encoded)
  return block
}
