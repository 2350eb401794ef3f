// Owns clients that leave: one choice, a whole request, or one that is over already.

import type { Action, Operation } from './operation.ts'

export const abort: Operation = {
  name: 'abort',
  rate: 0.015,
  draw(world, random): Action {
    const ids = [...world.expected.keys()]
    const id = ids.length === 0 || random.chance(0.1) ? world.someId(random) : random.pick(ids)
    const group = world.expected.get(id)?.request.group
    const whole = group !== undefined && random.chance(0.3)
    const aborted = whole
      ? ids.filter((other) => world.expected.get(other)?.request.group === group)
      : [id]
    return {
      describe: () => `abort ${aborted.join(', ')}`,
      run: (world) => aborted.forEach((id) => world.abort(id)),
    }
  },
}
