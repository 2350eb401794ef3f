// Owns the buffers that columns pass through between memory and disk. In a buffer a column is one
// piece, sealed or not; in memory it is a page in each range. They are copied with preadv and
// pwritev: the KV memory is never mapped here, a page appears there whole or not at all, and only
// after its column was authenticated.

import { mapHuge, readVector, unmap, viewMemory, writeVector } from '../ffi/libc.ts'
import { columnBytes, type TierGeometry } from './shared.ts'

/** About what one disk operation moves: larger ones gain nothing, smaller ones cost calls. */
const BUFFER_BYTES = 1 << 20

const IOV_BYTES = 16

/** What a column reads as that was lost: in half and single precision a NaN. */
const POISON = 0xff

export class TransferBuffer {
  readonly address: number
  private readonly geometry: TierGeometry
  private readonly memoryFd: number
  private readonly bytes: number
  private readonly columnBytes: number
  private readonly columnsMax: number
  /** By range, then column: a struct iovec each. */
  private readonly iovs: number

  constructor(geometry: TierGeometry, memoryFd: number) {
    this.geometry = geometry
    this.memoryFd = memoryFd
    this.columnBytes = columnBytes(geometry)
    this.columnsMax = columnsOfBuffer(geometry)
    const dataBytes = this.columnsMax * this.columnBytes
    const { address, bytes } = mapHuge(dataBytes + geometry.ranges * this.columnsMax * IOV_BYTES)
    this.address = address
    this.bytes = bytes
    this.iovs = this.address + dataBytes
    const words = new BigUint64Array(
      viewMemory(this.iovs, geometry.ranges * this.columnsMax * IOV_BYTES),
    )
    for (let range = 0, at = 0; range < geometry.ranges; range++) {
      for (let i = 0; i < this.columnsMax; i++) {
        words[at++] = BigInt(this.addressOf(i) + range * geometry.pageBytes)
        words[at++] = BigInt(geometry.pageBytes)
      }
    }
  }

  addressOf(column: number): number {
    return this.address + column * this.columnBytes
  }

  /** Fills the buffer from memory. */
  gather(region: number, first: number, count: number): void {
    this.each(region, first, count, readVector)
  }

  /** Writes the buffer to memory. */
  scatter(region: number, first: number, count: number): void {
    this.each(region, first, count, writeVector)
  }

  poison(column: number): void {
    new Uint8Array(viewMemory(this.addressOf(column), this.columnBytes)).fill(POISON)
  }

  close(): void {
    new Uint8Array(viewMemory(this.address, this.bytes)).fill(0)
    unmap(this.address, this.bytes)
  }

  private each(region: number, first: number, count: number, move: typeof readVector): void {
    const { ranges, rangeBytes, slotBytes, pageBytes } = this.geometry
    const offset = region * slotBytes + first * pageBytes
    for (let range = 0; range < ranges; range++) {
      const iovs = this.iovs + range * this.columnsMax * IOV_BYTES
      move(this.memoryFd, iovs, count, offset + range * rangeBytes, count * pageBytes)
    }
  }
}

/** Columns that one buffer holds. */
export function columnsOfBuffer(geometry: TierGeometry): number {
  // An iovec array has 1,024 entries at most (IOV_MAX).
  return Math.min(1024, Math.max(1, Math.floor(BUFFER_BYTES / columnBytes(geometry))))
}
