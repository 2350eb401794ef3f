// Owns the contract of what happens to a simulated engine between its steps. To add a kind of
// thing, write a file here and name it in operations.ts.

import type { Random } from '../../support/random.ts'
import type { World } from '../world.ts'

/** One thing that happens. It is drawn completely: running it takes no more random numbers. */
export interface Action {
  /** A line for the trace. */
  describe(): string
  run(world: World): void
}

export interface Operation {
  readonly name: string
  /** How often in a step, unless the seed makes it rarer or more frequent. */
  readonly rate: number
  /** Undefined if the world does not allow it now. */
  draw(world: World, random: Random): Action | undefined
}
