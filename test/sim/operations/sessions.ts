// Owns sessions that are moved out of memory and back when somebody asks, and the machine that has
// too little memory for all.

import type { Action, Operation } from './operation.ts'

export const moveSession: Operation = {
  name: 'move session',
  rate: 0.02,
  draw({ config, core }, random): Action | undefined {
    if (config.tierColumns === 0) return undefined
    const tenant = `tenant ${random.below(config.tenants)}`
    const kind = random.pick(['offload', 'offload', 'reload'] as const)
    const sessions = core.answer({ kind: 'sessions', tenant })
    const id = sessions.length === 0 ? 'none' : random.pick(sessions).id
    return {
      describe: () => `${kind} session ${id} of ${tenant}`,
      run: (world) => world.guard(() => void world.core.answer({ kind, tenant, id })),
    }
  },
}

export const relieve: Operation = {
  name: 'relieve',
  rate: 0.01,
  draw(): Action {
    return {
      describe: () => 'the machine has too little memory',
      run: (world) => world.guard(() => world.core.relieve()),
    }
  },
}
