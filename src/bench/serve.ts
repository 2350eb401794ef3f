// Owns a run of `lattice bench serve`: which requests are sent when, and the report of them all.

import { RandomStream } from '../engine/sampler-random.ts'
import { LatticeError } from '../errors.ts'
import { BenchClient } from './serve-client.ts'
import { datasetPrompts, type Prompt, randomPrompts } from './serve-prompts.ts'
import { type Goodput, type Metric, type Sample, type Totals, totalsOf } from './serve-report.ts'

export interface ServeBenchOptions {
  url: string
  apiKey: string | undefined
  /** The first that the server lists, if undefined. */
  model: string | undefined
  endpoint: 'chat' | 'completions'
  numPrompts: number
  /** Requests a second on average; Infinity sends all at once. */
  requestRate: number
  /** Shape of the gamma distribution of gaps: 1 is a Poisson process, less comes in bursts. */
  burstiness: number
  maxConcurrency: number | undefined
  numWarmups: number
  randomInputLen: number
  randomOutputLen: number
  randomRangeRatio: number
  /** A file of prompts, instead of random ones. */
  dataset: string | undefined
  temperature: number
  ignoreEos: boolean
  goodput: Goodput
  percentileMetrics: readonly Metric[]
  percentiles: readonly number[]
  seed: number
  timeoutMs: number
}

export type ServeReport = {
  date: string
  backend: 'openai' | 'openai-chat'
  model_id: string
  num_prompts: number
  request_rate: number | 'inf'
  burstiness: number
  max_concurrency: number | null
  seed: number
  /** What a reader must know of these numbers: estimates, failures. */
  notes: string[]
} & Totals

const UNCOUNTED =
  'The server did not count tokens (/tokenize, /detokenize): prompts are that many words instead.'

/**
 * Sends all requests and waits for their ends.
 *
 * @param progress is told of each phase, for people.
 * @throws LatticeError if the server cannot be reached or refuses the warm-up requests; failures
 *   after that are counted in the report.
 */
export async function runServeBench(
  options: ServeBenchOptions,
  progress: (message: string) => void,
): Promise<ServeReport> {
  const client = new BenchClient({
    url: new URL(options.url),
    apiKey: options.apiKey,
    timeoutMs: options.timeoutMs,
  })
  try {
    const model = options.model ?? (await firstModel(client))
    const notes: string[] = []
    const prompts = await promptsOf(client, model, options, notes)
    const warmups = prompts.splice(0, options.numWarmups)
    const send = (prompt: Prompt) => client.stream(...requestOf(prompt, model, options))

    progress(`warming up with ${warmups.length} requests …`)
    for (const prompt of warmups) {
      const outcome = await send(prompt)
      if (!outcome.ok) throw warmupFailed(outcome.error)
    }
    progress(`sending ${prompts.length} requests …`)
    const start = performance.now()
    const samples = await sendAll(prompts, send, options)
    const durationMs = performance.now() - start

    notes.push(...notesOn(samples))
    return {
      date: compactDate(new Date()),
      backend: options.endpoint === 'chat' ? 'openai-chat' : 'openai',
      model_id: model,
      num_prompts: options.numPrompts,
      request_rate: options.requestRate === Infinity ? 'inf' : options.requestRate,
      burstiness: options.burstiness,
      max_concurrency: options.maxConcurrency ?? null,
      seed: options.seed,
      notes,
      ...totalsOf(samples, durationMs, { ...options, metrics: options.percentileMetrics }),
    }
  } finally {
    client.close()
  }
}

async function firstModel(client: BenchClient): Promise<string> {
  const list = (await client.json('/v1/models', undefined)) as { data?: { id?: string }[] }
  const id = list.data?.[0]?.id
  if (id !== undefined) return id
  throw new LatticeError('model_not_found', 'The server lists no model.', {
    todo: 'Name one with --model.',
  })
}

/** The warm-up's prompts first, which are not the run's: a prefix cache must not know those. */
async function promptsOf(
  client: BenchClient,
  model: string,
  options: ServeBenchOptions,
  notes: string[],
): Promise<Prompt[]> {
  const random = async (count: number, seed: number): Promise<Prompt[]> => {
    const lengths = {
      inputTokens: options.randomInputLen,
      outputTokens: options.randomOutputLen,
      rangeRatio: options.randomRangeRatio,
    }
    const { prompts, exact } = await randomPrompts(client, model, count, lengths, seed)
    if (!exact) notes.push(UNCOUNTED)
    return prompts
  }
  const { dataset, numPrompts, numWarmups, seed } = options
  if (dataset === undefined) return random(numWarmups + numPrompts, seed)
  const warmups = numWarmups > 0 ? await random(numWarmups, seed) : []
  return [...warmups, ...datasetPrompts(dataset, numPrompts, options.randomOutputLen)]
}

function requestOf(
  prompt: Prompt,
  model: string,
  options: ServeBenchOptions,
): [path: string, body: object] {
  const shared = {
    model,
    temperature: options.temperature,
    stream: true,
    stream_options: { include_usage: true },
    ...(options.ignoreEos ? { ignore_eos: true } : {}),
  }
  if (options.endpoint === 'completions') {
    return ['/v1/completions', { ...shared, prompt: prompt.text, max_tokens: prompt.maxTokens }]
  }
  const messages = [{ role: 'user', content: prompt.text }]
  const body = { ...shared, messages, max_completion_tokens: prompt.maxTokens }
  return ['/v1/chat/completions', body]
}

/** Starts each request at its time, or when `maxConcurrency` lets it; answers in order. */
async function sendAll(
  prompts: readonly Prompt[],
  send: (prompt: Prompt) => Promise<Sample['outcome']>,
  options: ServeBenchOptions,
): Promise<Sample[]> {
  const slots = new Slots(options.maxConcurrency ?? Infinity)
  const startsMs = arrivalsMs(prompts.length, options)
  const start = performance.now()
  const running: Promise<Sample>[] = []
  for (const [i, prompt] of prompts.entries()) {
    const waitMs = start + startsMs[i]! - performance.now()
    if (waitMs > 0) await new Promise((resolve) => setTimeout(resolve, waitMs))
    running.push(
      slots.use(async () => ({ outcome: await send(prompt), promptTokens: prompt.tokens })),
    )
  }
  return Promise.all(running)
}

/**
 * When each request starts: gaps from a gamma distribution of mean 1/rate, scaled so that the last
 * starts exactly at count/rate; without that, runs of one rate would differ in load by their seed.
 */
export function arrivalsMs(
  count: number,
  { requestRate, burstiness, seed }: { requestRate: number; burstiness: number; seed: number },
): number[] {
  if (requestRate === Infinity) return Array.from({ length: count }, () => 0)
  // Another stream than the prompts': they stay the same at another rate.
  const random = new RandomStream(-seed - 1)
  const sums: number[] = []
  let sum = 0
  for (let i = 0; i < count; i++) sums.push((sum += gamma(random, burstiness)))
  return sums.map((at) => (at / sum) * (count / requestRate) * 1000)
}

/** A gamma variate of this shape and scale 1 (Marsaglia and Tsang 2000). */
function gamma(random: RandomStream, shape: number): number {
  if (shape < 1) return gamma(random, shape + 1) * (1 - random.uniform()) ** (1 / shape)
  const d = shape - 1 / 3
  for (;;) {
    const radius = Math.sqrt(-2 * Math.log(1 - random.uniform()))
    const normal = radius * Math.cos(2 * Math.PI * random.uniform())
    const v = (1 + normal / Math.sqrt(9 * d)) ** 3
    const u = 1 - random.uniform()
    if (v > 0 && Math.log(u) < normal ** 2 / 2 + d * (1 - v + Math.log(v))) return d * v
  }
}

/** Lets a number of tasks run at once, the others in order of asking. */
class Slots {
  #free: number
  readonly #waiting: (() => void)[] = []

  constructor(count: number) {
    this.#free = count
  }

  async use<T>(task: () => Promise<T>): Promise<T> {
    if (this.#free > 0) this.#free -= 1
    else await new Promise<void>((resolve) => this.#waiting.push(resolve))
    try {
      return await task()
    } finally {
      const next = this.#waiting.shift()
      if (next === undefined) this.#free += 1
      else next()
    }
  }
}

function notesOn(samples: readonly Sample[]): string[] {
  const notes: string[] = []
  if (samples.some(({ outcome }) => outcome.ok && outcome.outputTokens === undefined)) {
    notes.push('The server reports no usage: an event was taken for a token.')
  }
  const errors = new Map<string, number>()
  for (const { outcome } of samples) {
    if (!outcome.ok) errors.set(outcome.error, (errors.get(outcome.error) ?? 0) + 1)
  }
  const common = [...errors].toSorted(([, a], [, b]) => b - a)
  for (const [error, count] of common.slice(0, 5)) notes.push(`${count} failed: ${error}`)
  if (common.length > 5) notes.push(`… and ${common.length - 5} other errors.`)
  return notes
}

function warmupFailed(error: string): LatticeError {
  return new LatticeError('invalid_request', `The warm-up request failed: ${error}`, {
    todo: 'Check --url, --model, --endpoint and --api-key, and that the lengths fit the context.',
  })
}

/** Local time as vLLM writes it: 20240607-235959. */
function compactDate(date: Date): string {
  const two = (n: number): string => String(n).padStart(2, '0')
  const day = `${date.getFullYear()}${two(date.getMonth() + 1)}${two(date.getDate())}`
  return `${day}-${two(date.getHours())}${two(date.getMinutes())}${two(date.getSeconds())}`
}
