// Owns what fails for good: the device, or the kernel that moves memory. The engine must stop with
// that error, and whatever it said before was right.

import type { Action, Operation } from './operation.ts'

export const fail: Operation = {
  name: 'fail',
  rate: 0.001,
  draw(_world, random): Action {
    const what = random.pick(['launch', 'collect', 'map', 'discard'] as const)
    return {
      describe: () => `the next ${what} fails`,
      run: (world) => world.failNext(what),
    }
  },
}
