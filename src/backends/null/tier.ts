// Owns a tier that moves hashes where a real one moves pages, and throws where a real one would
// quietly write what is changing or bring back what never left. Tickets end after as many polls as
// it is told, so in any order, and fail when it is told.

import { assert, present } from '../../assert.ts'
import type { LatticeError } from '../../errors.ts'
import type { KvColumns } from '../../kv/regions.ts'
import type { KvTier } from '../../kv/tier.ts'
import type { NullColumn, NullKvMemory } from './kv-memory.ts'

export type NullTransfer = 'save' | 'load'

export interface NullTierOptions {
  /** Columns. */
  capacity: number
  /** What places hold from an earlier life, and will for a later one. */
  disk?: (NullColumn | undefined)[]
  /** Calls of `poll` after which a ticket ends, 1 or more; 1 unless told. */
  polls?: (ticket: number, kind: NullTransfer, columns: number) => number
  /** What a ticket fails with, if it does. */
  fault?: (ticket: number, kind: NullTransfer) => LatticeError | undefined
}

interface Transfer {
  ticket: number
  kind: NullTransfer
  columns: KvColumns
  places: Uint32Array
  /** As they were when a save began. */
  content: readonly NullColumn[]
  pollsLeft: number
}

/** What nobody wrote: a failed load leaves it behind. */
const GARBAGE = 0xbad

export class NullTier implements KvTier {
  readonly capacity: number
  private readonly memory: NullKvMemory
  private readonly options: NullTierOptions
  private readonly places: (NullColumn | undefined)[]
  private readonly pending: Transfer[] = []
  private tickets = 0

  constructor(memory: NullKvMemory, options: NullTierOptions) {
    this.memory = memory
    this.options = options
    this.capacity = options.capacity
    this.places = options.disk ?? Array.from({ length: options.capacity }, () => undefined)
  }

  save(columns: KvColumns, places: Uint32Array): number {
    this.checkFree(columns, places)
    return this.begin('save', columns, places, this.read(columns))
  }

  load(columns: KvColumns, places: Uint32Array): number {
    this.checkFree(columns, places)
    const content = [...places].map((place) => present(this.places[place], `place ${place}`))
    this.checkAbsent(columns)
    return this.begin('load', columns, places, content)
  }

  poll(): readonly { ticket: number; error: LatticeError | undefined }[] {
    for (const transfer of this.pending) transfer.pollsLeft--
    const ended = this.pending.filter(({ pollsLeft }) => pollsLeft <= 0)
    return ended.map((transfer) => {
      this.pending.splice(this.pending.indexOf(transfer), 1)
      return { ticket: transfer.ticket, error: this.end(transfer) }
    })
  }

  check(): void {}

  close(): void {}

  private begin(
    kind: NullTransfer,
    columns: KvColumns,
    places: Uint32Array,
    content: readonly NullColumn[],
  ): number {
    const ticket = ++this.tickets
    const pollsLeft = this.options.polls?.(ticket, kind, places.length) ?? 1
    this.pending.push({ ticket, kind, columns, places: places.slice(), content, pollsLeft })
    return ticket
  }

  private end({ ticket, kind, columns, places, content }: Transfer): LatticeError | undefined {
    const error = this.options.fault?.(ticket, kind)
    if (kind === 'save') {
      const same = this.read(columns).every((rows, i) => equal(rows, content[i]))
      assert(same, `what ticket ${ticket} writes out did not change meanwhile`)
      places.forEach((place, i) => (this.places[place] = error ? undefined : content[i]))
    } else {
      this.checkAbsent(columns)
      content.forEach((rows, i) => {
        const wrong = new Map([...rows.keys()].map((position) => [position, GARBAGE]))
        this.memory.restore(columns.region, columns.first + i, error ? wrong : rows)
      })
    }
    return error
  }

  private read({ region, first, end }: KvColumns): NullColumn[] {
    return Array.from({ length: end - first }, (_, i) => this.memory.column(region, first + i))
  }

  private checkAbsent({ region, first, end }: KvColumns): void {
    for (let c = first; c < end; c++) {
      assert(this.memory.isAbsent(region, c), `nobody has written column ${c} of region ${region}`)
    }
  }

  /** No other transfer is under way between these places, or to or from this memory. */
  private checkFree({ region, first, end }: KvColumns, places: Uint32Array): void {
    assert(places.length === end - first && end > first, 'a column has a place')
    for (const place of places) assert(place < this.capacity, `place ${place} exists`)
    for (const other of this.pending) {
      assert(
        !other.places.some((place) => places.includes(place)),
        'a place is used once at a time',
      )
      const { columns } = other
      const apart = columns.region !== region || columns.end <= first || columns.first >= end
      assert(apart || other.kind === 'save', 'columns are filled by one transfer at a time')
    }
  }
}

function equal(a: NullColumn, b: NullColumn | undefined): boolean {
  return a.size === b?.size && [...a].every(([position, hash]) => b.get(position) === hash)
}
