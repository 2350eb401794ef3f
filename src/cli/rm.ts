// Owns `lattice rm`.

import { Command } from 'commander'
import { LatticeError } from '../errors.ts'

export function rmCommand(): Command {
  return new Command('rm').description('Removes a model from the local store.').action(() => {
    throw new LatticeError('internal', 'not built yet')
  })
}
