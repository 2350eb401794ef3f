// Owns bugs that are put into an otherwise sound engine, so that a test can see the simulator find
// them: each is one that a pager of memory could really have.

import { present } from '../../src/assert.ts'
import { SimBackend } from './backend.ts'
import { insidesOf } from './insides.ts'
import { SimMemory } from './memory.ts'
import { type Parts, SOUND } from './world.ts'

/** One time in ten, whoever begins to use pages is not counted. */
const skippedRefcount: Parts = {
  ...SOUND,
  tamper(core) {
    const { regionTable } = insidesOf(core)
    const hold = regionTable.hold.bind(regionTable)
    let holds = 0
    regionTable.hold = (columns, holder) => {
      if (holder === 'live' && ++holds % 10 === 0) return
      hold(columns, holder)
    }
  },
}

/** The device says that a step is over while it still reads: until the next one is launched. */
class UnfencedBackend extends SimBackend {
  override launch(...batch: Parameters<SimBackend['launch']>): void {
    this.kv.endReading()
    super.launch(...batch)
  }

  protected override fence(): void {}
}

/** Every tenth time that pages are given back, they keep what was in them. */
class UnzeroedMemory extends SimMemory {
  private discards = 0

  override discard(region: number, first: number, end: number): void {
    if (++this.discards % 10 === 0) return
    super.discard(region, first, end)
  }
}

const PLANTED = {
  'skip a refcount': skippedRefcount,
  'drop a fence': { ...SOUND, backend: UnfencedBackend },
  'reuse before zero': { ...SOUND, memory: UnzeroedMemory },
} satisfies Record<string, Parts>

export type Planted = keyof typeof PLANTED
export const PLANTED_BUGS = Object.keys(PLANTED) as Planted[]

export function planted(bug: Planted): Parts {
  return present(PLANTED[bug], bug)
}
