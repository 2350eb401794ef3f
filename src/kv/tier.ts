// Owns the contract with whoever keeps KV outside of memory: columns go out to numbered places and
// come back from them, while the engine goes on.

import type { LatticeError } from '../errors.ts'
import type { KvColumns } from './regions.ts'

export interface EndedTicket {
  ticket: number
  error: LatticeError | undefined
  /** How long it took, if the tier knows better than whoever polls. */
  ms?: number
  /** Columns that came from the slower level of two. */
  below?: number
}

/** A tier of two levels: memory of the host, and a disk beneath unless that has no bytes. */
export interface TierLevels {
  hostBytes: number
  hostUsedBytes: number
  diskBytes: number
  diskUsedBytes: number
  /** Moved from the host's memory to the disk, since the start. */
  spilledBytes: number
}

/**
 * Where columns of KV go when memory is short, and come back from. One column = one page in each of
 * a region's ranges (src/kv/regions.ts).
 */
export interface KvTier {
  /** Columns that it holds at most; places are 0 … capacity−1, handed out by the policy. */
  readonly capacity: number
  /**
   * Begins to write columns [first, end) of a region to `places` (one each, in order). Their memory
   * must not change until the ticket is done.
   */
  save(columns: KvColumns, places: Uint32Array): number
  /**
   * Begins to fill columns of a region, which nobody has written, from `places`. A slot that maps
   * them may be read at once: a touch of an absent page waits until it is there (userfaultfd).
   */
  load(columns: KvColumns, places: Uint32Array): number
  /**
   * Tickets that ended since the last call, in order of their end. A failed load's columns have
   * undefined content and must not be used.
   */
  poll(): readonly EndedTicket[]
  /** Nobody holds a place any more: what lies there may go. */
  forget?(place: number): void
  /** Whether a place lies in the slower level of two. */
  isBelow?(place: number): boolean
  /** Milliseconds a byte, until something has been measured. */
  readonly guess?: { readonly save: number; readonly load: number }
  readonly levels?: TierLevels
  /** Throws LatticeError `pager_failed` once the pager has died. */
  check(): void
  close(): void
  /** Touches of columns that were not there yet, since the start. */
  readonly faults?: number
  /** The encrypted file, or its directory if it has no name. */
  readonly path?: string
  /** If places outlive the process. */
  readonly store?: KvStore
}

/** One cached prefix as it is kept beyond a restart, or the part of it beyond its parent's. */
export interface StoredPrefix {
  id: number
  /** The prefix that this one continues; 0 if it begins at the first token. */
  parent: number
  tenant: string
  /** Tokens from position `from`, where the parent ends. */
  from: number
  tokens: Int32Array
  /** Where columns from `firstColumn` on lie: the parent's last may be among them once more. */
  firstColumn: number
  places: Uint32Array
}

/** Remembers which places hold which prefix, through a restart or a crash. */
export interface KvStore {
  /** What an earlier process kept, parents before their children; its places are in use. */
  entries(): readonly StoredPrefix[]
  /**
   * Begins to remember a prefix whose columns have been saved. Once the ticket is done (`poll`
   * tells), it survives whatever happens to the process; until then it may or may not.
   */
  put(prefix: Omit<StoredPrefix, 'id'>): { id: number; ticket: number }
  /**
   * Forgets a prefix and all that continue it; their places may be used again at once. A prefix
   * whose columns could not be loaded must be removed, too.
   */
  remove(id: number): void
}
