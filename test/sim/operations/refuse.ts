// Owns requests that the engine must refuse, and nothing else may change for it.

import type { SequenceRequest } from '../../../src/engine/api.ts'
import type { Action, Operation } from './operation.ts'
import { drawRequest } from './submit.ts'

export const refuse: Operation = {
  name: 'refuse',
  rate: 0.005,
  draw(world, random): Action {
    const id = world.nextId(1)
    const good = drawRequest(world, random)
    const request: SequenceRequest = { ...good, sampling: { ...good.sampling, temperature: -1 } }
    return {
      describe: () => `submit ${id} with a temperature of -1`,
      run: (world) => world.submitRefused(id, request),
    }
  },
}
