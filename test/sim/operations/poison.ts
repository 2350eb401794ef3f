// Owns steps whose logits are not numbers: who sampled from them ends with an error, nobody else.

import type { Action, Operation } from './operation.ts'

export const poison: Operation = {
  name: 'poison',
  rate: 0.002,
  draw(): Action {
    return {
      describe: () => 'the next logits are not numbers',
      run: (world) => (world.backend.fault = 'nan'),
    }
  },
}
