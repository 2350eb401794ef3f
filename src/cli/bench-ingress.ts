// Owns `lattice bench ingress`: its options and how its report is printed.

import { Command, InvalidArgumentError, Option } from 'commander'
import { type IngressBenchReport, runIngressBench } from '../bench/ingress/ingress.ts'
import { info } from '../log.ts'
import { parseCount } from './parse.ts'
import { formatTable } from './table.ts'

interface IngressFlags {
  requests: number
  rates: number[]
  seconds: number
  model?: string
  json?: true
}

const RATES = [1, 10, 100, 1000, 10_000, 100_000]

export function benchIngressCommand(): Command {
  return new Command('ingress')
    .description(
      'Measures answers from the network driver against UDP, TCP and HTTP, on two hosts that it ' +
        'makes. Needs root, gcc and two cores.',
    )
    .option('--requests <N>', 'round trips of each kind', parseCount(100, 50_000), 20_000)
    .addOption(
      new Option('--rates <LIST>', 'requests a second that are tried')
        .argParser(parseRates)
        .default(RATES, RATES.join(',')),
    )
    .option('--seconds <S>', 'of each rate, of the flood and of the streams', parseCount(1, 60), 3)
    .option(
      '--model <FILE>',
      "deliver prompts to this model's tokenizer; without it a byte is a token",
    )
    .option('--json', 'print one JSON object; docs/bench.md lists its keys')
    .action(async ({ json, ...options }: IngressFlags) => {
      const report = await runIngressBench({ ...options, onProgress: info })
      process.stdout.write(json ? `${JSON.stringify(report)}\n` : text(report))
    })
}

const WAYS = {
  native: 'datagrams (native ring)',
  typescript: 'datagrams (ring in TypeScript)',
  http: 'HTTP',
} as const

function text(report: IngressBenchReport): string {
  const { round_trips: trips, flood, streams, first_token: first, delivery } = report
  const rows = trips.map((trip) => [
    trip.name,
    trip.prompt_bytes === 0 ? '–' : `${trip.prompt_bytes >> 10} KiB`,
    trip.rate === 0 ? 'closed' : `${trip.rate}`,
    ...[trip.p50_us, trip.p99_us, trip.p999_us].map((us) => us.toFixed(2)),
    (trip.cpu_ns / 1000).toFixed(2),
  ])
  const numbers = ['PROMPT', 'RATE/S', 'P50 µS', 'P99', 'P99.9', 'CPU µS']
  const columns = [{ title: 'ROUND TRIP' }, ...numbers.map((title) => ({ title, right: true }))]
  const { quiet, hogged, flooded, ratio, refused_hellos_per_s: hellos } = streams
  return [
    formatTable(columns, rows),
    '',
    `refusals a second and core: ${flood.refusals_per_s_per_core.toFixed(0)}, HTTP ` +
      `${flood.http_refusals_per_s_per_core.toFixed(0)}: ${flood.ratio.toFixed(0)} times`,
    `p99 between tokens: ${quiet.p99_itl_ms.toFixed(2)} ms, ${flooded.p99_itl_ms.toFixed(2)} ms ` +
      `under ${hellos.toFixed(0)} refused HELLOs a second; beside a busy core ` +
      `${hogged.p99_itl_ms.toFixed(2)} ms: ${ratio.toFixed(2)} times`,
    ...(['datagram', 'datagram_busy_poll', 'http'] as const).map(
      (kind) =>
        `first token, 4 KiB prompt, ${kind}: p50 ${first[kind].p50_ttft_ms.toFixed(2)} ms, ` +
        `p99 ${first[kind].p99_ttft_ms.toFixed(2)} ms, ` +
        `${first[kind].server_cpu_us.toFixed(0)} µs of the server's CPU`,
    ),
    ...delivery.map(({ kind, rate, cpu_us: cpu, cpu_us_min: least, threads_us: threads }) => {
      const parts = Object.entries(threads).map(([name, us]) => `${name} ${us.toFixed(1)}`)
      const load = rate === 0 ? 'as fast as it goes' : `${rate}/s`
      return (
        `4 KiB to the scheduler's queue by ${WAYS[kind]}, ${load}: ${cpu.toFixed(0)} µs of CPU, ` +
        `at least ${least.toFixed(0)} (${parts.join(', ')})`
      )
    }),
    '',
  ].join('\n')
}

function parseRates(list: string): number[] {
  const rates = list.split(',').map((part) => (/^\d+$/.test(part.trim()) ? Number(part) : 0))
  if (rates.every((rate) => rate >= 1 && rate <= 1e6)) return rates
  throw new InvalidArgumentError('Write whole numbers from 1 to 1000000, with commas between.')
}
