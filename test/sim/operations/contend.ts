// Owns another process that takes memory which was free, when somebody is about to use it, too, and
// gives all of it back.

import type { Action, Operation } from './operation.ts'

export const take: Operation = {
  name: 'take',
  rate: 0.3,
  draw({ config }, random): Action | undefined {
    if (!config.contended) return undefined
    const share = random.pick([0.2, 0.5, 1, 1])
    return {
      describe: () => `another process takes ${share * 100} % of what is free`,
      run: ({ memory }) => memory.contended?.take(share),
    }
  },
}

/** It is faster than a session that somebody wants back. */
export const takeBefore: Operation = {
  name: 'take before',
  rate: 0.05,
  draw({ config, core }, random): Action | undefined {
    if (!config.contended || config.tierColumns === 0) return undefined
    const tenant = `tenant ${random.below(config.tenants)}`
    const sessions = core.answer({ kind: 'sessions', tenant })
    const outside = sessions.filter(({ outPages }) => outPages > 0)
    if (outside.length === 0) return undefined
    const { id } = random.pick(outside)
    const share = random.pick([0.5, 1])
    return {
      describe: () =>
        `session ${id} of ${tenant} comes back, and ${share * 100} % are taken before`,
      run: (world) => {
        world.memory.contended?.take(share)
        world.guard(() => void world.core.answer({ kind: 'reload', tenant, id }))
      },
    }
  },
}

export const giveBack: Operation = {
  name: 'give back',
  rate: 0.3,
  draw({ config }): Action | undefined {
    if (!config.contended) return undefined
    return {
      describe: () => 'the other process gives its memory back',
      run: ({ memory }) => {
        if (memory.contended) memory.contended.taken = 0
      },
    }
  },
}
