// Owns time: a clock that goes on by a bit, stands still, or jumps by hours. It never goes back.

import type { Action, Operation } from './operation.ts'

export const clock: Operation = {
  name: 'clock',
  rate: 0.05,
  draw(_world, random): Action {
    const ms = random.pick([0.01, 5, 19.99, 20, 25, 1000, 86_400_000])
    return {
      describe: () => `the clock jumps by ${ms} ms`,
      run: (world) => (world.nowMs += ms),
    }
  },
}
