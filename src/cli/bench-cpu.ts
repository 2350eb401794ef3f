// Owns `lattice bench cpu` and `lattice bench parity`: their options and how results are printed.

import { Command } from 'commander'
import { type CpuBenchReport, runCpuBench } from '../bench/cpu.ts'
import { type ParityReport, runParity } from '../bench/parity.ts'
import { allowedCpus } from '../ffi/libc.ts'
import { info } from '../log.ts'
import { resolveModel } from '../model/registry.ts'
import { computeCpus } from '../os/cpus.ts'
import { parseCount } from './parse.ts'

interface CommonFlags {
  peer: string
  model?: string
  threads?: number
  json?: true
}

interface CpuFlags extends CommonFlags {
  rounds: number
  streams: number
  promptTokens: number
  outputTokens: number
}

interface ParityFlags extends CommonFlags {
  outputTokens: number
  positions: number
}

const PEER_HELP = 'folder where `npm install node-llama-cpp` was run'

export function benchCpuCommand(): Command {
  return new Command('cpu')
    .description('Measures the CPU engine against node-llama-cpp: same file, threads and tokens.')
    .requiredOption('--peer <DIR>', PEER_HELP)
    .option('-m, --model <MODEL>', 'a name from `lattice ls`, a source as for pull, or a path')
    .option('--threads <N>', 'compute threads of both (default: one a core)', parseCount(1))
    .option('--rounds <N>', 'measured rounds, after one to warm up', parseCount(1), 7)
    .option('--streams <N>', 'sequences of the batched run', parseCount(1), 16)
    .option('--prompt-tokens <N>', 'tokens of the prefill run', parseCount(1), 512)
    .option('--output-tokens <N>', 'tokens decoded by each sequence', parseCount(2), 64)
    .option('--json', 'print one JSON object')
    .action(async (flags: CpuFlags) => {
      const report = await runCpuBench({
        ...(await common(flags)),
        rounds: flags.rounds,
        streams: flags.streams,
        promptTokens: flags.promptTokens,
        outputTokens: flags.outputTokens,
      })
      process.stdout.write(flags.json ? `${JSON.stringify(report)}\n` : table(report))
    })
}

export function benchParityCommand(): Command {
  return new Command('parity')
    .description('Compares greedy tokens and distributions with node-llama-cpp on the same file.')
    .requiredOption('--peer <DIR>', PEER_HELP)
    .option('-m, --model <MODEL>', 'a name from `lattice ls`, a source as for pull, or a path')
    .option('--threads <N>', 'compute threads of both (default: one a core)', parseCount(1))
    .option('--output-tokens <N>', 'greedy tokens of each prompt', parseCount(1), 64)
    .option('--positions <N>', 'positions whose distributions are compared', parseCount(1), 2000)
    .option('--json', 'print one JSON object')
    .action(async (flags: ParityFlags) => {
      const report = await runParity({
        ...(await common(flags)),
        outputTokens: flags.outputTokens,
        positions: flags.positions,
      })
      process.stdout.write(flags.json ? `${JSON.stringify(report)}\n` : verdict(report))
    })
}

async function common(flags: CommonFlags): Promise<{
  modelPath: string
  peerFolder: string
  threads: number
  onProgress: (line: string) => void
}> {
  const { path } = await resolveModel(flags.model)
  const threads = computeCpus(allowedCpus(), flags.threads).length
  return { modelPath: path, peerFolder: flags.peer, threads, onProgress: info }
}

function table(report: CpuBenchReport): string {
  const lines = [
    `${report.threads} threads, prompt ${report.prompt_tokens}, output ${report.output_tokens},` +
      ` ${report.streams} streams, medians of ${report.rounds} rounds (tokens/s)`,
    'RUN       LATTICE  NODE-LLAMA-CPP  RATIO  (MIN–MAX)',
  ]
  for (const row of report.rows) {
    lines.push(
      row.name.padEnd(8) +
        row.lattice_tokens_per_s.toFixed(0).padStart(9) +
        row.peer_tokens_per_s.toFixed(0).padStart(16) +
        row.ratio.toFixed(2).padStart(7) +
        `  (${row.ratio_min.toFixed(2)}–${row.ratio_max.toFixed(2)})`,
    )
  }
  lines.push(
    `engine outside compute at ${report.streams} streams: ` +
      `${report.overhead_percent.toFixed(2)} % of step time`,
  )
  return `${lines.join('\n')}\n`
}

function verdict(report: ParityReport): string {
  const lines = [
    `identical: ${report.identical} of ${report.prompts} prompts × ${report.output_tokens} tokens`,
    ...report.differences.map(
      ({ prompt, position, gap }) =>
        `  prompt ${prompt} parts at token ${position}: top two logits ${gap.toFixed(4)} apart`,
    ),
    `KL over ${report.positions} positions: mean ${report.mean_kl.toExponential(2)},` +
      ` max ${report.max_kl.toExponential(2)}`,
  ]
  return `${lines.join('\n')}\n`
}
