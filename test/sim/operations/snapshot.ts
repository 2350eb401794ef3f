// Owns looks at the engine from outside: its numbers must be those of the world.

import type { Action, Operation } from './operation.ts'

export const snapshot: Operation = {
  name: 'snapshot',
  rate: 0.01,
  draw(): Action {
    return { describe: () => 'snapshot', run: (world) => world.checkSnapshot() }
  },
}
