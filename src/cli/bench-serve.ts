// Owns `lattice bench serve`: its options, and how its report is printed and kept.

import { Command, InvalidArgumentError, Option } from 'commander'
import { writeFileSync } from 'node:fs'
import { formatTotals, type Metric, METRICS, parseGoodput } from '../bench/serve-report.ts'
import { runServeBench } from '../bench/serve.ts'
import { LatticeError } from '../errors.ts'
import { info, warn } from '../log.ts'

interface Flags {
  url: string
  apiKey?: string
  model?: string
  endpoint: 'chat' | 'completions'
  numPrompts: number
  numWarmups: number
  requestRate: number
  burstiness: number
  maxConcurrency?: number
  randomInputLen: number
  randomOutputLen: number
  randomRangeRatio: number
  dataset?: string
  temperature: number
  ignoreEos?: boolean
  goodput?: string[]
  percentileMetrics: Metric[]
  percentiles: number[]
  seed: number
  timeout: number
  json?: boolean
  output?: string
}

/** Exits 1 if no request succeeded. */
export function benchServeCommand(): Command {
  return new Command('serve')
    .description("Measures any server of the OpenAI API, in the terms of vLLM's benchmark.")
    .optionsGroup('Server:')
    .option('--url <URL>', "the server's address", parseUrl, 'http://127.0.0.1:8080')
    .option('--model <MODEL>', 'model to ask for (default: the first that the server lists)')
    .addOption(
      new Option('--endpoint <NAME>', 'which API to use')
        .choices(['chat', 'completions'])
        .default('completions'),
    )
    .addOption(new Option('--api-key <KEY>', 'sent as bearer token').env('OPENAI_API_KEY'))
    .option('--timeout <S>', 'seconds of silence that fail a request', numberIn(0.001, 1e6), 600)
    .optionsGroup('Load:')
    .option('--num-prompts <N>', 'requests to measure', wholeIn(1), 100)
    .option('--num-warmups <N>', 'requests before, one by one, not measured', wholeIn(0), 1)
    .addOption(
      new Option('--request-rate <R>', 'requests a second; inf sends all at once')
        .argParser(rate)
        .default(Infinity, 'inf'),
    )
    .option(
      '--burstiness <B>',
      'shape of the gaps: 1 is a Poisson process, less comes in bursts, more is even',
      numberIn(0.001, 1e6),
      1,
    )
    .option('--max-concurrency <N>', 'requests at once (default: no limit)', wholeIn(1))
    .optionsGroup('Prompts:')
    .option('--random-input-len <N>', 'tokens of a random prompt', wholeIn(1), 512)
    .option('--random-output-len <N>', 'tokens to ask for', wholeIn(1), 128)
    .option(
      '--random-range-ratio <R>',
      'lengths vary evenly from N·(1 − R) to N·(1 + R)',
      numberIn(0, 0.999),
      0,
    )
    .option('--dataset <FILE>', 'JSON lines like {"prompt": "…", "output_tokens": 64} instead')
    .option('--temperature <T>', '0 always takes the likeliest token', numberIn(0, 2), 0)
    .option('--ignore-eos', 'answers have exactly the length asked for')
    .option('--seed <N>', 'same seed, same prompts and times', wholeIn(0, 2 ** 52), 0)
    .optionsGroup('Report:')
    .option('--goodput <LIMIT...>', 'what a good request keeps, in ms: ttft:500 tpot:50')
    .addOption(
      new Option('--percentile-metrics <LIST>', 'which to report')
        .argParser(metricList)
        .default([...METRICS], METRICS.join(',')),
    )
    .addOption(
      new Option('--percentiles <LIST>', 'which percentiles: 50,90,99.9')
        .argParser(percentileList)
        .default([99], '99'),
    )
    .option('--json', 'print one JSON object; docs/bench.md lists its keys')
    .option('--output <FILE>', 'write the JSON to a file as well')
    .action(run)
}

async function run(flags: Flags): Promise<void> {
  const { percentileMetrics, percentiles } = flags
  const report = await runServeBench(
    {
      ...flags,
      apiKey: flags.apiKey,
      model: flags.model,
      maxConcurrency: flags.maxConcurrency,
      dataset: flags.dataset,
      ignoreEos: flags.ignoreEos ?? false,
      goodput: parseGoodput(flags.goodput ?? []),
      timeoutMs: flags.timeout * 1000,
    },
    info,
  )
  for (const note of report.notes) warn(note)
  const json = JSON.stringify(report)
  if (flags.output !== undefined) write(flags.output, json)
  console.log(flags.json ? json : formatTotals(report, percentileMetrics, percentiles))
  if (report.completed === 0) process.exitCode = 1
}

function write(path: string, json: string): void {
  try {
    writeFileSync(path, `${json}\n`)
  } catch (error) {
    throw new LatticeError('usage', `${path} cannot be written: ${(error as Error).message}`, {
      todo: 'Check --output.',
      cause: error,
    })
  }
}

/** With or without /v1 at its end, as clients of the API want it. */
function parseUrl(text: string): string {
  if (URL.canParse(text) && /^https?:$/.test(new URL(text).protocol)) {
    return text.replace(/\/+$/, '').replace(/\/v1$/, '')
  }
  throw new InvalidArgumentError('Write an address such as http://127.0.0.1:8080.')
}

function numberIn(min: number, max: number): (text: string) => number {
  return (text) => {
    const value = text.trim() === '' ? NaN : Number(text)
    if (value >= min && value <= max) return value
    throw new InvalidArgumentError(`Write a number from ${min} to ${max}.`)
  }
}

function wholeIn(min: number, max = Number.MAX_SAFE_INTEGER): (text: string) => number {
  return (text) => {
    const value = /^\d+$/.test(text.trim()) ? Number(text) : NaN
    if (value >= min && value <= max) return value
    throw new InvalidArgumentError(`Write a whole number of at least ${min}.`)
  }
}

function rate(text: string): number {
  return text === 'inf' ? Infinity : numberIn(1e-6, 1e6)(text)
}

function metricList(text: string): Metric[] {
  const wrong = text.split(',').find((name) => !METRICS.includes(name as Metric))
  if (wrong === undefined) return text.split(',') as Metric[]
  throw new InvalidArgumentError(`Write some of ${METRICS.join(',')}, with commas between.`)
}

function percentileList(text: string): number[] {
  return text.split(',').map(numberIn(0, 100))
}
