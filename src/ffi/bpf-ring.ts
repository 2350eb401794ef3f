// Owns reading a BPF ring buffer through its mapped pages, without a system call: the kernel writes
// records and the producer's position, we the consumer's. Any thread may read, one at a time.
// Documentation/bpf/ringbuf.rst of the kernel.

import koffi from 'koffi'
import { LatticeError } from '../errors.ts'
import { mapShared, unmap, viewMemory } from './libc.ts'

const PAGE_BYTES = 4096
const HEADER_BYTES = 8
const BUSY = 1 << 31
const DISCARDED = 1 << 30
const PROT_READ = 1
const MAP_SHARED = 1

const libc = koffi.load('libc.so.6')
const mmap = libc.func('mmap', 'intptr_t', ['uintptr_t', 'size_t', 'int', 'int', 'int', 'int64_t'])

export class BpfRing {
  private readonly consumer: { address: number; position: BigInt64Array }
  private readonly producer: { address: number; bytes: number; position: BigInt64Array }
  private readonly view: DataView
  private readonly words: Int32Array
  private readonly mask: number

  /** @param bytes the map's max_entries */
  constructor(fd: number, bytes: number) {
    const address = mapShared(fd, PAGE_BYTES)
    this.consumer = { address, position: new BigInt64Array(viewMemory(address, 8)) }
    // Twice in a row, so that a record that wraps lies in one piece.
    const all = PAGE_BYTES + 2 * bytes
    const data: number = mmap(0, all, PROT_READ, MAP_SHARED, fd, PAGE_BYTES)
    if (data === -1) {
      const errno = koffi.errno()
      throw new LatticeError('os_call_failed', `mmap failed with errno ${errno}: a ring buffer.`)
    }
    const memory = viewMemory(data, all)
    this.producer = { address: data, bytes: all, position: new BigInt64Array(memory, 0, 1) }
    this.view = new DataView(memory, PAGE_BYTES)
    this.words = new Int32Array(memory, PAGE_BYTES)
    this.mask = bytes - 1
  }

  /**
   * Hands over what is there; a record's bytes are valid during the call.
   * @returns how many there were
   */
  drain(take: (view: DataView, at: number, bytes: number) => void): number {
    let position = Number(this.consumer.position[0])
    const end = Number(Atomics.load(this.producer.position, 0))
    let count = 0
    while (position < end) {
      const at = position & this.mask
      const header = Atomics.load(this.words, at >> 2)
      if (header & BUSY) break
      const bytes = header & ~(BUSY | DISCARDED)
      if (!(header & DISCARDED)) {
        take(this.view, at + HEADER_BYTES, bytes)
        count++
      }
      position += (HEADER_BYTES + bytes + 7) & ~7
      Atomics.store(this.consumer.position, 0, BigInt(position))
    }
    return count
  }

  close(): void {
    unmap(this.consumer.address, PAGE_BYTES)
    unmap(this.producer.address, this.producer.bytes)
  }
}
