// Owns a disk that becomes slow or fast, and transfers that fail: a failed one costs time, never an
// answer.

import type { Action, Operation } from './operation.ts'

export const slowDisk: Operation = {
  name: 'slow disk',
  rate: 0.01,
  draw({ config }, random): Action | undefined {
    if (config.tierColumns === 0) return undefined
    const slowness = random.pick([1, 1, 2, 5, 20])
    return {
      describe: () => `a transfer takes up to ${slowness} polls`,
      run: ({ tier }) => tier && (tier.disk.slowness = slowness),
    }
  },
}

export const failingDisk: Operation = {
  name: 'failing disk',
  rate: 0.01,
  draw({ config }, random): Action | undefined {
    if (config.tierColumns === 0) return undefined
    const errors = random.pick([1, 2, 3, 1000])
    return {
      describe: () => `the next ${errors} transfers fail`,
      run: ({ tier }) => tier && (tier.disk.errors = errors),
    }
  },
}
