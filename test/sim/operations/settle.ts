// Owns the moments in which the engine is told that there is time to give memory back.

import type { Action, Operation } from './operation.ts'

export const settle: Operation = {
  name: 'settle',
  rate: 0.05,
  draw(): Action {
    return { describe: () => 'settle', run: (world) => world.settle() }
  },
}
