// Owns the contract with whoever keeps KV outside of memory: columns go out to numbered places and
// come back from them, while the engine goes on.

import type { LatticeError } from '../errors.ts'
import type { KvColumns } from './regions.ts'

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
  poll(): readonly { ticket: number; error: LatticeError | undefined }[]
  /** Throws LatticeError `pager_failed` once the pager has died. */
  check(): void
  close(): void
}
