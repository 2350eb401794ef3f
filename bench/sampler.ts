// Owns the sampler's micro-benchmark: microseconds a row by mode. `node bench/sampler.ts --json`.

import { parseArgs } from 'node:util'
import type { SamplingParams } from '../src/engine/api.ts'
import { GREEDY } from '../src/engine/api.ts'
import { RandomStream } from '../src/engine/sampler-random.ts'
import { Sampler, SamplerState } from '../src/engine/sampler.ts'

const { values } = parseArgs({
  options: {
    json: { type: 'boolean', default: false },
    vocab: { type: 'string', default: '49152' },
    seed: { type: 'string', default: '1' },
    rounds: { type: 'string', default: '40' },
  },
})
const vocab = Number(values.vocab)
const seed = Number(values.seed)
const rounds = Number(values.rounds)
/** As many rows as a step of batch 16 hands over, so that caches see what they see then. */
const ROWS = 16

/** Logits like a language model's: a normal bulk far below a few likely tokens. */
function makeRow(random: RandomStream): Float32Array {
  const row = new Float32Array(vocab)
  for (let i = 0; i < vocab; i++) {
    const radius = Math.sqrt(-2 * Math.log(1 - random.uniform()))
    row[i] = 2 + 2.5 * radius * Math.cos(2 * Math.PI * random.uniform())
  }
  for (let i = 0; i < 200; i++) {
    row[Math.floor(random.uniform() * vocab)] = 10 + 10 * random.uniform() ** 2
  }
  return row
}

const random = new RandomStream(seed)
const rows = Array.from({ length: ROWS }, () => makeRow(random))
const prompt = Int32Array.from({ length: 1000 }, () => Math.floor(random.uniform() * vocab))
const sampler = new Sampler(vocab)

const T1: SamplingParams = { ...GREEDY, temperature: 1 }
const modes: Record<string, SamplingParams> = {
  greedy: GREEDY,
  sampled: T1,
  sampled_t07: { ...T1, temperature: 0.7 },
  top_k_40: { ...T1, topK: 40 },
  top_p_095: { ...T1, topP: 0.95 },
  top_k_40_top_p_095: { ...T1, topK: 40, topP: 0.95 },
  top_p_095_t2: { ...T1, topP: 0.95, temperature: 2 },
  min_p_005: { ...T1, minP: 0.05 },
  typical_p_095: { ...T1, typicalP: 0.95 },
  greedy_repetition: { ...GREEDY, repetitionPenalty: 1.1 },
}

interface Result {
  mode: string
  min_us: number
  median_us: number
  p99_us: number
}

function measure(mode: string, one: (row: Float32Array) => void): Result {
  for (let i = 0; i < 50; i++) for (const row of rows) one(row)
  const micros: number[] = []
  for (let round = 0; round < rounds; round++) {
    const start = performance.now()
    for (const row of rows) one(row)
    micros.push(((performance.now() - start) * 1000) / ROWS)
  }
  micros.sort((a, b) => a - b)
  const at = (share: number): number => Number(micros[Math.floor(share * (rounds - 1))]!.toFixed(2))
  return { mode, min_us: at(0), median_us: at(0.5), p99_us: at(0.99) }
}

const results = Object.entries(modes).map(([mode, params]) => {
  const state = new SamplerState(params, prompt)
  return measure(mode, (row) => {
    sampler.accept(state, sampler.sample(row, state))
  })
})
results.push(measure('logprobs_5', (row) => void sampler.logprobs(row, 7, 5)))

if (values.json) {
  console.log(JSON.stringify({ vocab, rows: ROWS, rounds, seed, results }))
} else {
  console.log(`microseconds a row of ${vocab} logits (seed ${seed}, ${rounds} rounds of ${ROWS})`)
  for (const { mode, min_us, median_us, p99_us } of results) {
    const columns = [min_us, median_us, p99_us].map((us) => us.toFixed(1).padStart(9)).join('')
    console.log(mode.padEnd(20) + columns)
  }
}
