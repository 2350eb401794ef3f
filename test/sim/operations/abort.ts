// Owns clients that leave: one choice, a whole request, or one that is over already.

import type { Action, Operation } from './operation.ts'

export const abort: Operation = {
  name: 'abort',
  rate: 0.015,
  draw(world, random): Action {
    const ids = [...world.expected.keys()]
    const id = ids.length === 0 || random.chance(0.1) ? world.someId(random) : random.pick(ids)
    const request = world.expected.get(id)?.request
    const aborted = random.chance(0.3)
      ? ids.filter((other) => world.expected.get(other)?.request.requestId === request?.requestId)
      : [id]
    return {
      describe: () => `abort ${aborted.join(', ')}`,
      run: (world) => aborted.forEach((id) => world.abort(id)),
    }
  },
}
