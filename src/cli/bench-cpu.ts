// Owns `lattice bench cpu`.

import { Command } from 'commander'
import { LatticeError } from '../errors.ts'

export function benchCpuCommand(): Command {
  return new Command('cpu').description('Measures the CPU backend.').action(() => {
    throw new LatticeError('internal', 'not built yet')
  })
}
