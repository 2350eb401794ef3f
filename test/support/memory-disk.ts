// Owns a disk for tests of the tier above it: it moves bytes of pinned memory when it is polled
// often enough, in any order, and fails when it is told.

import assert from 'node:assert/strict'
import type { HostPages } from '../../src/backends/cuda/host-pages.ts'
import { LatticeError } from '../../src/errors.ts'
import { viewMemory } from '../../src/ffi/libc.ts'
import type { KvColumns } from '../../src/kv/regions.ts'
import type { EndedTicket, KvTier } from '../../src/kv/tier.ts'

interface Transfer {
  ticket: number
  kind: 'save' | 'load'
  first: number
  places: Uint32Array
  /** Of a save, when it began. */
  before: Uint8Array
  pollsLeft: number
}

export class MemoryDisk implements KvTier {
  readonly capacity: number
  readonly moved = { save: 0, load: 0, failed: 0 }
  private readonly pages: HostPages
  private readonly polls: () => number
  private readonly fails: () => boolean
  private readonly content: (Uint8Array | undefined)[] = []
  private pending: Transfer[] = []
  private tickets = 0

  constructor(pages: HostPages, capacity: number, polls: () => number, fails: () => boolean) {
    this.pages = pages
    this.capacity = capacity
    this.polls = polls
    this.fails = fails
  }

  save(columns: KvColumns, places: Uint32Array): number {
    return this.begin('save', columns, places)
  }

  load(columns: KvColumns, places: Uint32Array): number {
    return this.begin('load', columns, places)
  }

  poll(): readonly EndedTicket[] {
    const ended = this.pending.filter((transfer) => --transfer.pollsLeft <= 0)
    this.pending = this.pending.filter((transfer) => !ended.includes(transfer))
    return ended.map((transfer) => ({ ticket: transfer.ticket, error: this.end(transfer) }))
  }

  check(): void {}

  close(): void {}

  private begin(kind: Transfer['kind'], columns: KvColumns, places: Uint32Array): number {
    assert.equal(columns.region, 0)
    assert.equal(places.length, columns.end - columns.first)
    assert.ok(columns.end <= this.pages.frames && places.every((place) => place < this.capacity))
    for (const { first, places: others } of this.pending) {
      assert.ok(!others.some((place) => places.includes(place)), 'a place is used once at a time')
      const apart = first >= columns.end || first + others.length <= columns.first
      assert.ok(apart, 'a frame is used once at a time')
    }
    const before = this.frames(columns.first, places.length).slice()
    const transfer = { kind, first: columns.first, places: places.slice(), before }
    this.pending.push({ ...transfer, ticket: ++this.tickets, pollsLeft: this.polls() })
    return this.tickets
  }

  private end({ kind, first, places, before }: Transfer): LatticeError | undefined {
    const { pageBytes } = this.pages
    const frames = this.frames(first, places.length)
    if (kind === 'save') assert.deepEqual(frames, before, 'what is written did not change')
    const failed = this.fails()
    places.forEach((place, i) => {
      const frame = frames.subarray(i * pageBytes, (i + 1) * pageBytes)
      if (kind === 'save') this.content[place] = failed ? undefined : frame.slice()
      else if (failed) frame.fill(0xee)
      else frame.set(this.content[place]!)
    })
    this.moved[failed ? 'failed' : kind] += places.length
    return failed ? new LatticeError('os_call_failed', 'io') : undefined
  }

  private frames(first: number, count: number): Uint8Array {
    const { address, pageBytes } = this.pages
    return new Uint8Array(viewMemory(address + first * pageBytes, count * pageBytes))
  }
}
