// Owns `lattice ls`.

import { Command } from 'commander'
import { LatticeError } from '../errors.ts'

export function lsCommand(): Command {
  return new Command('ls').description('Lists the models in the local store.').action(() => {
    throw new LatticeError('internal', 'not built yet')
  })
}
