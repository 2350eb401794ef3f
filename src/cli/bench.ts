// Owns `lattice bench`: the measurements there are.

import { Command } from 'commander'
import { benchCpuCommand, benchParityCommand } from './bench-cpu.ts'
import { benchGpuCommand } from './bench-gpu.ts'
import { benchKvCommand } from './bench-kv.ts'
import { benchServeCommand } from './bench-serve.ts'

export function benchCommand(): Command {
  return new Command('bench')
    .description(
      'Measures a server, KV memory, the CPU or GPU backend. docs/bench.md lists the JSON keys.',
    )
    .addCommand(benchServeCommand())
    .addCommand(benchKvCommand())
    .addCommand(benchCpuCommand())
    .addCommand(benchParityCommand())
    .addCommand(benchGpuCommand())
}
