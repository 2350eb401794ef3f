// Owns the memory of the GPU that tests run on: physical pages with bytes, address ranges, mappings
// between them, and an error for each misuse of them.

import { LatticeError } from '../../src/errors.ts'
import type { PageLocation } from '../../src/ffi/cuda.ts'

/** Bytes [address, address + bytes). */
export interface Range {
  address: number
  bytes: number
}

interface Physical {
  bytes: Uint8Array
  location: PageLocation
  mappings: number
  released: boolean
}

interface Mapping {
  start: number
  bytes: number
  handle: number
  allowed: boolean
}

export abstract class MockGpuMemory {
  readonly page: number
  /** Less when another process takes some. */
  totalBytes: number
  /** Whether a call for pages, the first is 0, is refused: another process was there before. */
  refuses: (call: number) => boolean = () => false
  /** Calls by name: what a test counts. */
  readonly calls = new Map<string, number>()
  private next = 0x7e00_0000_0000
  protected readonly reservations = new Map<number, number>()
  protected readonly physical = new Map<number, Physical>()
  /** By page of the address space. */
  protected readonly mappings = new Map<number, Mapping>()
  protected readonly allocations = new Map<number, Uint8Array>()

  constructor(options: { pageBytes?: number; totalBytes?: number } = {}) {
    this.page = options.pageBytes ?? 2 << 20
    this.totalBytes = options.totalBytes ?? 80 * 2 ** 30
  }

  /** Physical memory that is taken now. */
  get residentBytes(): number {
    let bytes = 0
    for (const { bytes: own } of this.physical.values()) bytes += own.length
    for (const own of this.allocations.values()) bytes += own.length
    return bytes
  }

  /** Throws if work is queued that touches the range. */
  protected abstract assertIdle(range: Range, what: string): void

  /** The bytes behind an address, as a kernel sees them: a view of one page at most. */
  view(address: number, bytes: number): Uint8Array {
    const parts = this.translate({ address, bytes }, 'view')
    if (parts.length !== 1) throw new Error('a view lies in one page')
    return parts[0]!
  }

  read(address: number, bytes: number): Uint8Array<ArrayBuffer> {
    const copy = new Uint8Array(bytes)
    let at = 0
    for (const part of this.translate({ address, bytes }, 'read')) {
      copy.set(part, at)
      at += part.length
    }
    return copy
  }

  write(address: number, data: Uint8Array): void {
    let at = 0
    for (const part of this.translate({ address, bytes: data.length }, 'write')) {
      part.set(data.subarray(at, at + part.length))
      at += part.length
    }
  }

  memoryInfo(): { freeBytes: number; totalBytes: number } {
    return { freeBytes: this.totalBytes - this.residentBytes, totalBytes: this.totalBytes }
  }

  allocate(bytes: number): number {
    this.take('cuMemAlloc', bytes)
    const address = this.addresses(bytes)
    this.allocations.set(address, new Uint8Array(bytes))
    return address
  }

  free(address: number): void {
    const bytes = this.allocations.get(address)?.length
    if (bytes === undefined) throw new Error(`free of ${address}, which is not allocated`)
    this.assertIdle({ address, bytes }, 'free')
    this.allocations.delete(address)
  }

  pageBytes(): number {
    return this.page
  }

  reserve(bytes: number): number {
    if (bytes % this.page !== 0) throw new Error(`reserve: ${bytes} is no multiple of a page`)
    const address = this.addresses(bytes)
    this.reservations.set(address, bytes)
    return address
  }

  freeReservation(address: number, bytes: number): void {
    if (this.reservations.get(address) !== bytes) throw new Error('freeReservation of another size')
    for (const { start } of this.mappings.values()) {
      if (start >= address && start < address + bytes) throw new Error('freeReservation with pages')
    }
    this.reservations.delete(address)
  }

  createPages(bytes: number, location: PageLocation): number {
    this.count('createPages')
    if (bytes % this.page !== 0) throw new Error(`createPages: ${bytes} is no multiple of a page`)
    this.take(
      'cuMemCreate',
      this.refuses((this.calls.get('createPages') ?? 0) - 1) ? Infinity : bytes,
    )
    const handle = this.fresh()
    // Poisoned: fresh memory of a GPU holds whatever was there.
    const data = new Uint8Array(bytes).fill(0xcd)
    this.physical.set(handle, { bytes: data, location, mappings: 0, released: false })
    return handle
  }

  releasePages(handle: number): void {
    const page = this.physical.get(handle)
    if (!page || page.released) throw new Error(`releasePages of ${handle}, released before`)
    if (page.mappings > 0)
      throw new Error(`releasePages of ${handle} with ${page.mappings} mappings`)
    this.physical.delete(handle)
  }

  map(address: number, bytes: number, handle: number): void {
    this.count('map')
    const page = this.physical.get(handle)
    if (!page) throw new Error(`map of ${handle}, which does not exist`)
    if (bytes !== page.bytes.length) throw new Error('map of a part of a handle')
    const inside = [...this.reservations].some(
      ([start, length]) => address >= start && address + bytes <= start + length,
    )
    if (!inside || address % this.page !== 0)
      throw new Error(`map outside a reservation: ${address}`)
    const mapping = { start: address, bytes, handle, allowed: false }
    for (let at = address; at < address + bytes; at += this.page) {
      if (this.mappings.has(at / this.page)) throw new Error(`map over what is mapped at ${at}`)
    }
    for (let at = address; at < address + bytes; at += this.page) {
      this.mappings.set(at / this.page, mapping)
    }
    page.mappings++
  }

  unmap(address: number, bytes: number): void {
    this.count('unmap')
    this.assertIdle({ address, bytes }, 'unmap')
    for (const mapping of this.wholeMappings(address, bytes, 'unmap')) {
      for (let at = mapping.start; at < mapping.start + mapping.bytes; at += this.page) {
        this.mappings.delete(at / this.page)
      }
      this.physical.get(mapping.handle)!.mappings--
    }
  }

  allow(address: number, bytes: number): void {
    this.count('allow')
    for (const mapping of this.wholeMappings(address, bytes, 'allow')) mapping.allowed = true
  }

  /** The memory behind a range, page by page, or what a GPU would say of an illegal address. */
  protected translate({ address, bytes }: Range, what: string): Uint8Array[] {
    for (const [start, memory] of this.allocations) {
      if (address >= start && address + bytes <= start + memory.length) {
        return [memory.subarray(address - start, address - start + bytes)]
      }
    }
    const parts: Uint8Array[] = []
    for (let at = address; at < address + bytes;) {
      const mapping = this.mappings.get(Math.floor(at / this.page))
      if (!mapping?.allowed) throw new Error(`${what}: illegal address ${at.toString(16)}`)
      const end = Math.min(address + bytes, mapping.start + mapping.bytes)
      const { bytes: memory } = this.physical.get(mapping.handle)!
      parts.push(memory.subarray(at - mapping.start, end - mapping.start))
      at = end
    }
    return parts
  }

  private wholeMappings(address: number, bytes: number, what: string): Set<Mapping> {
    const found = new Set<Mapping>()
    for (let at = address; at < address + bytes; at += this.page) {
      const mapping = this.mappings.get(at / this.page)
      if (!mapping) throw new Error(`${what} of ${at.toString(16)}, where nothing is mapped`)
      if (mapping.start < address || mapping.start + mapping.bytes > address + bytes) {
        throw new Error(`${what} of a part of a mapping`)
      }
      found.add(mapping)
    }
    return found
  }

  private take(call: string, bytes: number): void {
    if (bytes <= this.totalBytes - this.residentBytes) return
    throw new LatticeError('gpu_call_failed', `${call} failed with CUDA_ERROR_OUT_OF_MEMORY.`, {
      details: { call, code: 'CUDA_ERROR_OUT_OF_MEMORY', bytes },
    })
  }

  private addresses(bytes: number): number {
    const address = Math.ceil(this.next / this.page) * this.page
    this.next = address + bytes + this.page
    return address
  }

  protected fresh(): number {
    return this.next++
  }

  protected count(call: string): void {
    this.calls.set(call, (this.calls.get(call) ?? 0) + 1)
  }
}
