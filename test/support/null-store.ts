// Owns a null tier with a store: what is durable survives a life, what is not may or may not.

import type { NullColumn, NullKvMemory } from '../../src/backends/null/kv-memory.ts'
import { NullTier, type NullTierOptions } from '../../src/backends/null/tier.ts'
import type { LatticeError } from '../../src/errors.ts'
import type { KvColumns } from '../../src/kv/regions.ts'
import type { KvStore, KvTier, StoredPrefix } from '../../src/kv/tier.ts'
import type { Random } from './random.ts'

/** What outlives an engine. */
export class NullDisk {
  readonly content: (NullColumn | undefined)[]
  records: StoredPrefix[] = []
  nextId = 1

  constructor(capacity: number) {
    this.content = Array.from({ length: capacity }, () => undefined)
  }
}

export class NullStoreTier implements KvTier, KvStore {
  readonly capacity: number
  readonly store = this
  private readonly tier: NullTier
  private readonly disk: NullDisk
  private readonly random: Random
  /** Puts that are not durable, by ticket; negative, so that they are not the tier's. */
  private readonly pending = new Map<number, StoredPrefix>()
  private tickets = 0

  constructor(memory: NullKvMemory, disk: NullDisk, random: Random, options: NullTierOptions) {
    this.capacity = options.capacity
    this.tier = new NullTier(memory, { ...options, disk: disk.content })
    this.disk = disk
    this.random = random
  }

  save(columns: KvColumns, places: Uint32Array): number {
    return this.tier.save(columns, places)
  }

  load(columns: KvColumns, places: Uint32Array): number {
    return this.tier.load(columns, places)
  }

  poll(): readonly { ticket: number; error: LatticeError | undefined }[] {
    const ended = [...this.tier.poll()]
    for (const [ticket, prefix] of this.pending) {
      if (this.random.below(3) > 0) continue
      this.pending.delete(ticket)
      this.disk.records.push(prefix)
      ended.push({ ticket, error: undefined })
    }
    return ended
  }

  check(): void {}

  close(): void {}

  entries(): readonly StoredPrefix[] {
    return [...this.disk.records]
  }

  put(prefix: Omit<StoredPrefix, 'id'>): { id: number; ticket: number } {
    const id = this.disk.nextId++
    const ticket = --this.tickets
    this.pending.set(ticket, { id, ...prefix })
    return { id, ticket }
  }

  remove(id: number): void {
    this.disk.records = this.disk.records.filter((record) => record.id !== id)
    for (const prefix of this.pending.values()) if (prefix.id === id) Object.assign(prefix, GONE)
  }

  /** The process is gone: of what was not durable yet, some is. */
  crash(): void {
    for (const prefix of this.pending.values()) {
      if (prefix.id >= 0 && this.random.below(2) === 0) this.disk.records.push(prefix)
    }
    this.disk.records = this.disk.records.filter(({ id }) => id >= 0)
  }
}

/** Removed before it was written: both are in the log. */
const GONE = { id: -1 }
