// Owns what happens when the pager has died: nothing that it was about to bring back may ever be
// read as zeros, and nobody may wait for it for ever.

import { wakeFaults } from '../ffi/userfaultfd.ts'
import type { PagerStart } from './pager.ts'
import * as words from './shared.ts'
import { TierShared } from './shared.ts'
import { TransferBuffer } from './transfer.ts'

/** The pager ended because it was asked to. */
export function closed(start: PagerStart): void {
  end(sharedOf(start), words.CLOSED)
}

/**
 * First everyone can see that it is dead: the engine looks after every step, before it believes
 * what the step computed. Then the absent columns are filled with NaN, and who waited for them is
 * let go. The descriptor of faults stays open: closing it would let them read zeros.
 */
export function died(start: PagerStart): void {
  const shared = sharedOf(start)
  end(shared, words.DEAD)
  const { slots, regions, columns, slotBytes } = start.geometry
  const buffer = new TransferBuffer(start.geometry, start.memoryFd)
  buffer.poison(0)
  for (let region = 0; region < regions; region++) {
    for (let column = 0; column < columns; column++) {
      const index = shared.index(region, column)
      if (Atomics.load(shared.moving, index) === words.LOADING) buffer.scatter(region, column, 1)
    }
  }
  buffer.close()
  if (start.faultFd >= 0) wakeFaults(start.faultFd, start.slotsAddress, slots * slotBytes)
  Atomics.store(shared.header, words.BURIED, 1)
  Atomics.notify(shared.header, words.BURIED)
  const signal = new Int32Array(start.signal)
  Atomics.add(signal, 0, 1)
  Atomics.notify(signal, 0)
}

/** STATE of its shared memory. */
export function pagerState(start: PagerStart): number {
  return Atomics.load(sharedOf(start).header, words.STATE)
}

function sharedOf({ geometry, wakeFd, shared }: PagerStart): TierShared {
  return new TierShared(geometry, wakeFd, shared)
}

function end(shared: TierShared, state: number): void {
  Atomics.store(shared.header, words.STATE, state)
  for (const word of [words.STATE, words.SETTLED, words.REQUESTS_TAKEN]) {
    Atomics.notify(shared.header, word)
  }
}
