// Owns `lattice bench gpu`: which parts run and how their rows are printed.

import { Command, Option } from 'commander'
import type { GpuRow } from '../bench/gpu-measure.ts'

interface GpuFlags {
  part: string
  json?: true
}

export function benchGpuCommand(): Command {
  return new Command('gpu')
    .description('Measures the GPU backend, part by part, each value beside what bounds it.')
    .addOption(
      new Option('--part <PART>', 'what is measured')
        .choices(['all', 'attention', 'decode', 'fp8', 'memory', 'serve', 'tiers'])
        .default('all'),
    )
    .option('--json', 'print one JSON object')
    .action(async ({ part, json }: GpuFlags) => {
      const { GPU_PARTS, runGpuBench } = await import('../bench/gpu.ts')
      const parts = part === 'all' ? Object.keys(GPU_PARTS) : [part]
      const onRow = json ? (): void => {} : (row: GpuRow): void => print(line(row))
      const report = await runGpuBench(parts, onRow)
      if (json) print(JSON.stringify(report))
    })
}

function line({ part, name, value, unit, reference, against }: GpuRow): string {
  const measured = `${part.padEnd(9)} ${name.padEnd(48)} ${short(value).padStart(8)} ${unit}`
  if (reference === undefined) return measured
  return `${measured.padEnd(74)} ${short(reference).padStart(8)} ${against ?? ''}`
}

function short(value: number): string {
  return value >= 100 ? value.toFixed(0) : value.toPrecision(3)
}

function print(text: string): void {
  process.stdout.write(`${text}\n`)
}
