// Owns what fails for good: the device, the kernel that moves memory, or the pager. The engine must
// stop with that error, and whatever it said before was right.

import type { Action, Operation } from './operation.ts'

/** pager in a step: what that step reads from then on is not what was there. */
export const FAILURES = [
  'launch',
  'collect',
  'map',
  'copy',
  'discard',
  'pager',
  'pager in a step',
] as const

export type Failure = (typeof FAILURES)[number]

export const fail: Operation = {
  name: 'fail',
  rate: 0.001,
  draw({ config }, random): Action | undefined {
    const what = random.pick(FAILURES)
    if (what.startsWith('pager') && config.tierColumns === 0) return undefined
    return {
      describe: () => `failure: ${what}`,
      run: (world) => world.failNext(what),
    }
  },
}
