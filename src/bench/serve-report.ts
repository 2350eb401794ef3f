// Owns what a run of `lattice bench serve` amounts to: throughputs, latencies and goodput, under
// the field names and by the definitions of `vllm bench serve`.

import { LatticeError } from '../errors.ts'
import type { Outcome } from './serve-client.ts'

export const METRICS = ['ttft', 'tpot', 'itl', 'e2el'] as const
export type Metric = (typeof METRICS)[number]

/** The latest, in milliseconds, that a request may be to count as good. */
export type Goodput = Partial<Record<'ttft' | 'tpot' | 'e2el', number>>

/** One request as it ended, with what was asked for where the server does not count. */
export interface Sample {
  outcome: Outcome
  promptTokens: number
}

export interface Totals {
  duration: number
  completed: number
  failed: number
  total_input_tokens: number
  total_output_tokens: number
  request_throughput: number
  request_goodput: number | null
  output_throughput: number
  total_token_throughput: number
  /** mean_, median_, std_ and percentiles of each metric: `p99_ttft_ms`. Null without samples. */
  [latency: `${string}_ms`]: number | null
}

/**
 * TTFT is the time to the first token, E2EL to the last. TPOT is (E2EL − TTFT) / (output tokens
 * − 1), over requests with two tokens or more. ITL is each gap between two events with text, of
 * all requests together. Throughputs are over the whole duration; failed requests count in none.
 * A request is good if each of its times is within the goodput's; one token alone has no TPOT.
 *
 * @param durationMs from the first request's start to the last one's end.
 */
export function totalsOf(
  samples: readonly Sample[],
  durationMs: number,
  options: { goodput: Goodput; metrics: readonly Metric[]; percentiles: readonly number[] },
): Totals {
  const values: Record<Metric, number[]> = { ttft: [], tpot: [], itl: [], e2el: [] }
  let inputTokens = 0
  let outputTokens = 0
  let good = 0
  let completed = 0
  for (const { outcome, promptTokens } of samples) {
    if (!outcome.ok) continue
    const tokens = outputTokensOf(outcome)
    const tpot = tokens > 1 ? (outcome.latencyMs - outcome.ttftMs) / (tokens - 1) : 0
    completed += 1
    inputTokens += outcome.promptTokens ?? promptTokens
    outputTokens += tokens
    values.ttft.push(outcome.ttftMs)
    values.e2el.push(outcome.latencyMs)
    for (const gap of outcome.itlsMs) values.itl.push(gap)
    if (tokens > 1) values.tpot.push(tpot)
    const { ttft = Infinity, tpot: tpotMax = Infinity, e2el = Infinity } = options.goodput
    if (outcome.ttftMs <= ttft && tpot <= tpotMax && outcome.latencyMs <= e2el) good += 1
  }
  const seconds = durationMs / 1000
  const totals: Totals = {
    duration: seconds,
    completed,
    failed: samples.length - completed,
    total_input_tokens: inputTokens,
    total_output_tokens: outputTokens,
    request_throughput: completed / seconds,
    request_goodput: Object.keys(options.goodput).length === 0 ? null : good / seconds,
    output_throughput: outputTokens / seconds,
    total_token_throughput: (inputTokens + outputTokens) / seconds,
  }
  for (const metric of options.metrics) {
    const sorted = values[metric].toSorted((a, b) => a - b)
    totals[`mean_${metric}_ms`] = mean(sorted)
    totals[`median_${metric}_ms`] = percentile(sorted, 50)
    totals[`std_${metric}_ms`] = deviation(sorted)
    for (const p of options.percentiles) totals[`p${p}_${metric}_ms`] = percentile(sorted, p)
  }
  return totals
}

/** As the server counts; one that does not is taken to send a token an event. */
function outputTokensOf(outcome: Outcome): number {
  return outcome.outputTokens ?? outcome.itlsMs.length + 1
}

/** Linear interpolation between the closest ranks, numpy's default; null for no values. */
export function percentile(sorted: readonly number[], p: number): number | null {
  if (sorted.length === 0) return null
  const rank = (p / 100) * (sorted.length - 1)
  const low = sorted[Math.floor(rank)]!
  const high = sorted[Math.ceil(rank)]!
  return low + (high - low) * (rank - Math.floor(rank))
}

function mean(values: readonly number[]): number | null {
  if (values.length === 0) return null
  return values.reduce((sum, value) => sum + value, 0) / values.length
}

/** Of the population, as numpy's std. */
function deviation(values: readonly number[]): number | null {
  const centre = mean(values)
  if (centre === null) return null
  return Math.sqrt(values.reduce((sum, v) => sum + (v - centre) ** 2, 0) / values.length)
}

/**
 * Reads `ttft:500 tpot:50`.
 * @throws LatticeError `usage`
 */
export function parseGoodput(pairs: readonly string[]): Goodput {
  const goodput: Goodput = {}
  for (const pair of pairs) {
    const [, name, ms] = /^(ttft|tpot|e2el):(\d+(?:\.\d+)?)$/.exec(pair) ?? []
    if (name === undefined) {
      throw new LatticeError('usage', `--goodput cannot be ${pair}.`, {
        todo: 'Name ttft, tpot or e2el and milliseconds: --goodput ttft:500 tpot:50',
      })
    }
    goodput[name as keyof Goodput] = Number(ms)
  }
  return goodput
}

const TITLES: Record<Metric, string> = {
  ttft: 'time to first token',
  tpot: 'time per output token after the first',
  itl: 'inter-token latency',
  e2el: 'end-to-end latency',
}

/** The totals as a person reads them. */
export function formatTotals(
  totals: Totals,
  metrics: readonly Metric[],
  percentiles: readonly number[],
): string {
  const lines = [
    row('requests completed, failed', `${totals.completed}, ${totals.failed}`),
    row('duration', `${totals.duration.toFixed(2)} s`),
    row('tokens in, out', `${totals.total_input_tokens}, ${totals.total_output_tokens}`),
    row('requests', `${totals.request_throughput.toFixed(2)} /s`),
  ]
  if (totals.request_goodput !== null) {
    lines.push(row('good requests', `${totals.request_goodput.toFixed(2)} /s`))
  }
  lines.push(
    row('output tokens', `${totals.output_throughput.toFixed(2)} /s`),
    row('all tokens', `${totals.total_token_throughput.toFixed(2)} /s`),
  )
  const columns = ['mean', 'median', 'std', ...percentiles.map((p) => `p${p}`)]
  lines.push('', row('milliseconds', columns.map((name) => name.padStart(10)).join('')))
  for (const metric of metrics) {
    const cells = columns.map((name) => {
      const value = totals[`${name}_${metric}_ms`]
      return (typeof value === 'number' ? value.toFixed(2) : '–').padStart(10)
    })
    lines.push(row(TITLES[metric], cells.join('')))
  }
  return lines.join('\n')
}

function row(title: string, value: string): string {
  return `${title.padEnd(40)}${value}`
}
