// Owns `lattice pull`.

import { Command } from 'commander'
import { LatticeError } from '../errors.ts'

export function pullCommand(): Command {
  return new Command('pull').description('Fetches a model into the local store.').action(() => {
    throw new LatticeError('internal', 'not built yet')
  })
}
