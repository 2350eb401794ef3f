// Owns `lattice bench kv`: its options and how results are printed.

import { Command } from 'commander'
import { type KvResult, runKvBench } from '../bench/kv.ts'
import type { KvEngineResult } from '../bench/kv-engine.ts'
import { LatticeError } from '../errors.ts'
import { info } from '../log.ts'
import { parseCount } from './parse.ts'
import { formatBytes, formatTable } from './table.ts'

interface KvFlags {
  seed: number
  cachedTokens: number
  engine?: true
  model?: string
  threads?: number
  json?: true
}

export function benchKvCommand(): Command {
  return new Command('kv')
    .description(
      'Compares memory managers on one trace of chats, documents, a shared system prompt, beams' +
        ' and a tree of branches: a static reservation, blocks of 16 tokens, and this one.',
    )
    .option('--seed <N>', 'same seed, same trace', parseCount(0), 1)
    .option(
      '--cached-tokens <N>',
      'tokens of prefixes that may be kept without a sequence',
      parseCount(1),
      50_000,
    )
    .option('--engine', 'run a small one on a model as well, with and without sharing, timed')
    .option('-m, --model <MODEL>', 'for --engine: a name, source or path, as for serve')
    .option('--threads <N>', 'for --engine: compute threads', parseCount(1))
    .option('--json', 'print one JSON object')
    .action(bench)
}

async function bench(flags: KvFlags): Promise<void> {
  if (!flags.engine && (flags.model !== undefined || flags.threads !== undefined)) {
    throw new LatticeError('usage', '--model and --threads are for --engine.')
  }
  const { seed, cachedTokens } = flags
  const results = runKvBench(flags)
  if (!flags.json) print(`${managersTable(results)}\n`)
  let timed: KvEngineResult[] | undefined
  if (flags.engine) {
    const [{ resolveModel }, { runKvEngine }] = await Promise.all([
      import('../model/registry.ts'),
      import('../bench/kv-engine.ts'),
    ])
    const { id, path } = await resolveModel(flags.model)
    info(`running on ${id}, twice`)
    timed = await runKvEngine(path, seed, flags.threads)
    if (!flags.json) print(`\n${engineTable(timed)}\n`)
  }
  if (!flags.json) return
  const engine = timed === undefined ? {} : { engine: timed.map(keyedEngine) }
  const report = { seed, cached_tokens: cachedTokens, results: results.map(keyed), ...engine }
  print(`${JSON.stringify(report)}\n`)
}

function keyedEngine(result: KvEngineResult): object {
  return {
    work: result.work,
    sharing: result.sharing,
    seconds: result.seconds,
    peak_bytes: result.peakBytes,
    prompt_tokens: result.promptTokens,
    found_tokens: result.foundTokens,
    computed_tokens: result.computedTokens,
    output_tokens: result.outputTokens,
  }
}

function engineTable(results: readonly KvEngineResult[]): string {
  const right = true
  const columns = [
    { title: 'ON THE ENGINE' },
    { title: 'SHARING' },
    { title: 'TIME', right },
    { title: 'PEAK', right },
    { title: 'PROMPT', right },
    { title: 'COMPUTED', right },
    { title: 'FOUND', right },
    { title: 'OUTPUT', right },
  ]
  const rows = results.map((result, i) => [
    result.work === results[i - 1]?.work ? '' : result.work,
    result.sharing,
    `${result.seconds.toFixed(2)} s`,
    formatBytes(result.peakBytes),
    String(result.promptTokens),
    String(result.computedTokens),
    `${((100 * result.foundTokens) / result.promptTokens).toFixed(1)} %`,
    String(result.outputTokens),
  ])
  return formatTable(columns, rows)
}

function keyed(result: KvResult): object {
  return {
    work: result.work,
    manager: result.manager,
    peak_bytes: result.peakBytes,
    mean_bytes: Math.round(result.meanBytes),
    waste: result.waste,
    copied_bytes: result.copiedBytes,
    prompt_tokens: result.promptTokens,
    found_tokens: result.foundTokens,
  }
}

function managersTable(results: readonly KvResult[]): string {
  const right = true
  const columns = [
    { title: 'WORK' },
    { title: 'MANAGER' },
    { title: 'PEAK', right },
    { title: 'MEAN', right },
    { title: 'WASTE', right },
    { title: 'COPIED', right },
    { title: 'FOUND', right },
  ]
  const rows = results.map((result, i) => [
    result.work === results[i - 1]?.work ? '' : result.work,
    result.manager,
    formatBytes(result.peakBytes),
    formatBytes(result.meanBytes),
    `${(100 * result.waste).toFixed(1)} %`,
    formatBytes(result.copiedBytes),
    `${((100 * result.foundTokens) / result.promptTokens).toFixed(1)} %`,
  ])
  return formatTable(columns, rows)
}

function print(text: string): void {
  process.stdout.write(text)
}
