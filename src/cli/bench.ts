// Owns `lattice bench`: the measurements there are.

import { Command } from 'commander'
import { benchCpuCommand, benchParityCommand } from './bench-cpu.ts'
import { benchGpuCommand } from './bench-gpu.ts'
import { benchIngressCommand } from './bench-ingress.ts'
import { benchKvCommand } from './bench-kv.ts'
import { benchServeCommand } from './bench-serve.ts'

export function benchCommand(): Command {
  return new Command('bench')
    .description(
      'Measures a server, KV memory, ingress, the CPU or the GPU.' +
        ' docs/bench.md lists the keys of the JSON.',
    )
    .addCommand(benchServeCommand())
    .addCommand(benchKvCommand())
    .addCommand(benchIngressCommand())
    .addCommand(benchCpuCommand())
    .addCommand(benchParityCommand())
    .addCommand(benchGpuCommand())
}
