// Owns `lattice bench serve`.

import { Command } from 'commander'
import { LatticeError } from '../errors.ts'

export function benchServeCommand(): Command {
  return new Command('serve').description('Measures any server of the OpenAI API.').action(() => {
    throw new LatticeError('internal', 'not built yet')
  })
}
