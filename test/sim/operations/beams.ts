// Owns beam searches: forks at every token, slots that change hands, all of it or nothing.

import { GREEDY } from '../../../src/engine/api.ts'
import type { Action, Operation } from './operation.ts'
import { drawRequest } from './submit.ts'

/** The plain search that tells what is right takes its time. */
const TOKENS_MAX = 8

export const beams: Operation = {
  name: 'beams',
  rate: 0.01,
  draw(world, random): Action | undefined {
    const width = random.between(2, 4)
    const answers = random.between(1, width)
    const drawn = drawRequest(world, random)
    const request = {
      ...drawn,
      sampling: GREEDY,
      topLogprobs: undefined,
      maxTokens: Math.min(drawn.maxTokens, random.between(1, TOKENS_MAX)),
      beams: {
        width,
        lengthPenalty: random.pick([0, 1, 1.5]),
        earlyStopping: random.pick([true, false, 'never'] as const),
      },
    }
    if (world.expected.size + answers > world.config.sequencesMax) return undefined
    const first = world.nextId(answers)
    return {
      describe: () =>
        `submit ${first}: ${answers} of ${width} beams for ${request.tenant}, ` +
        `[${request.prompt.join(' ')}] + ${request.maxTokens}`,
      run: (world) => world.submit(first, request, answers),
    }
  },
}
