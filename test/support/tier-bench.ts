// Owns host KV memory with a tier beneath it, without an engine: columns of known content, slots
// that show them, tickets that are waited for.

import { HOST_PAGE_BYTES, HostKvMemory } from '../../src/backends/cpu/kv-memory.ts'
import type { LatticeError } from '../../src/errors.ts'
import { viewMemory } from '../../src/ffi/libc.ts'
import { type KvLayout, layerMajor } from '../../src/kv/layout.ts'
import { PagerHost } from '../../src/tier/pager-host.ts'
import type { DiskTier, OffloadOptions } from '../../src/tier/tier.ts'

export interface TierBenchOptions extends Partial<
  Omit<OffloadOptions, 'bytes' | 'signal' | 'startPager'>
> {
  layers?: number
  columns?: number
  slots?: number
  regions?: number
  /** Places on disk. */
  capacity?: number
}

export class TierBench {
  readonly kv: HostKvMemory
  readonly tier: DiskTier
  readonly layout: KvLayout
  readonly signal = new Int32Array(new SharedArrayBuffer(4))
  private readonly memory: Int32Array
  private host: PagerHost | undefined

  constructor(options: TierBenchOptions = {}) {
    const { layers = 3, columns = 16, slots = 3, regions = 6, capacity = 64, ...rest } = options
    const shape = { layers, rowBytes: 512, maxTokens: columns * 8, pageBytes: HOST_PAGE_BYTES }
    this.layout = layerMajor(shape)
    this.kv = new HostKvMemory(this.layout, slots, regions, {
      ...rest,
      bytes: capacity * layers * HOST_PAGE_BYTES,
      signal: this.signal.buffer as SharedArrayBuffer,
      startPager: (start) => {
        this.host = new PagerHost(start)
      },
    })
    this.tier = this.kv.tier!
    this.memory = new Int32Array(viewMemory(this.kv.address, this.layout.slotBytes * slots))
  }

  /** Why the pager died, if it did. */
  deathCode(): string | undefined {
    return this.host?.death?.code
  }

  /** Writes what belongs to `seed` into a slot's column. */
  write(slot: number, column: number, seed: number): void {
    for (let range = 0; range < this.layout.ranges; range++) {
      const at = this.wordOf(slot, column, range)
      for (let i = 0; i < HOST_PAGE_BYTES / 4; i++) this.memory[at + i] = content(seed, range, i)
    }
  }

  /** Whether a slot's column has in every word what `write` wrote; begins at the last range. */
  holds(slot: number, column: number, seed: number): boolean {
    for (let range = this.layout.ranges - 1; range >= 0; range--) {
      const at = this.wordOf(slot, column, range)
      for (let i = 0; i < HOST_PAGE_BYTES / 4; i++) {
        if (this.memory[at + i] !== content(seed, range, i)) return false
      }
    }
    return true
  }

  /** The word at the begin of a page. */
  peek(slot: number, column: number, range = 0): number {
    return this.word(slot, column, range, 0)
  }

  /** Word `i` of a page. */
  word(slot: number, column: number, range: number, i: number): number {
    return this.memory[this.wordOf(slot, column, range) + i]!
  }

  /** Blocks until a ticket has ended. @returns its error */
  ended(ticket: number): LatticeError | undefined {
    for (;;) {
      const seen = Atomics.load(this.signal, 0)
      for (const done of this.tier.poll()) this.results.set(done.ticket, done.error)
      if (this.results.has(ticket)) return this.results.get(ticket)
      this.tier.check()
      Atomics.wait(this.signal, 0, seen, 100)
    }
  }

  async close(): Promise<void> {
    this.kv.close()
    await this.host?.terminate()
  }

  async killPager(): Promise<void> {
    await this.host?.terminate()
  }

  private readonly results = new Map<number, LatticeError | undefined>()

  private wordOf(slot: number, column: number, range: number): number {
    const { slotBytes, rangeBytes } = this.layout
    return (slot * slotBytes + range * rangeBytes + column * HOST_PAGE_BYTES) / 4
  }
}

function content(seed: number, range: number, i: number): number {
  return Math.imul(seed * 64 + range + 1, 0x9e3779b1) ^ Math.imul(i + 1, 0x85ebca6b)
}

/** Places from `first` on, one after the other. */
export function places(first: number, count: number): Uint32Array {
  return Uint32Array.from({ length: count }, (_, i) => first + i)
}
