// Owns prefixes that are pinned, and unpinned again: in use, in part another's, too large, unknown.

import { regionsFor } from '../../../src/kv/regions.ts'
import type { Action, Operation } from './operation.ts'
import { drawRequest } from './submit.ts'

export const pin: Operation = {
  name: 'pin',
  rate: 0.01,
  draw(world, random): Action | undefined {
    // How many regions may be pinned is a fixed bound, made for as many as an engine really has.
    if (world.config.regions < regionsFor(world.config.slots)) return undefined
    const id = world.nextId(1)
    const drawn = drawRequest(world, random)
    const request = { ...drawn, maxTokens: 1, pin: drawn.prompt.join(' ') }
    return {
      describe: () => `submit ${id} for ${request.tenant}, to be pinned: [${request.pin}]`,
      run: (world) => world.submit(id, request, 1),
    }
  },
}

export const unpin: Operation = {
  name: 'unpin',
  rate: 0.01,
  draw(world, random): Action {
    const [tenant = 'nobody', id = 'nothing'] = random.pick([...world.pinned, ':']).split(': ')
    return {
      describe: () => `unpin [${id}] of ${tenant}`,
      run: (world) => world.unpin(tenant, id),
    }
  },
}
