// Owns the checks of sampling: HF transformers' own distributions, a naive second implementation,
// statistics of what is drawn, and what must hold of ties, seeds and broken rows.

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { test } from 'node:test'
import fc from 'fast-check'
import { referenceDistribution, softmax } from '../../test/support/sampler-reference.ts'
import { LatticeError } from '../errors.ts'
import type { SamplingParams } from './api.ts'
import { GREEDY } from './api.ts'
import { RandomStream } from './sampler-random.ts'
import { Sampler, SamplerState } from './sampler.ts'

const T1: SamplingParams = { ...GREEDY, temperature: 1 }

/** One of each path through the sampler. */
const MODES: Record<string, SamplingParams> = {
  greedy: GREEDY,
  plain: T1,
  topK: { ...T1, topK: 5 },
  topP: { ...T1, topP: 0.9 },
  minP: { ...T1, minP: 0.1 },
  typical: { ...T1, typicalP: 0.9 },
  all: { ...T1, temperature: 1.5, topK: 30, topP: 0.95, minP: 0.01, typicalP: 0.9 },
}

function randomRow(vocab: number, seed: number, spread = 3): Float32Array {
  const random = new RandomStream(seed)
  return Float32Array.from({ length: vocab }, () => {
    const radius = Math.sqrt(-2 * Math.log(1 - random.uniform()))
    return spread * radius * Math.cos(2 * Math.PI * random.uniform())
  })
}

function stateOf(params: SamplingParams, prompt: number[] = [], output: number[] = []) {
  const state = new SamplerState(params, prompt)
  for (const token of output) state.accept(token)
  return state
}

interface Golden {
  kind: string
  params: Omit<SamplingParams, 'seed'>
  prompt: number[]
  output: number[]
  logits: string
  kept: string
  probabilities: string
}

function bytes(base64: string): ArrayBuffer {
  return Uint8Array.from(Buffer.from(base64, 'base64')).buffer
}

test("a filter or penalty departs from HF transformers' definition", () => {
  const file = new URL('../../test/goldens/sampler.json', import.meta.url)
  const { vocab, cases } = JSON.parse(readFileSync(file, 'utf8')) as {
    vocab: number
    cases: Golden[]
  }
  assert.ok(cases.length > 80)
  const sampler = new Sampler(vocab)
  for (const golden of cases) {
    const name = `${golden.kind} ${JSON.stringify(golden.params)}`
    const state = stateOf({ ...golden.params, seed: 0 }, golden.prompt, golden.output)
    const row = new Float32Array(bytes(golden.logits))
    const { tokens, probabilities } = sampler.distribution(row, state)
    const oracle = new Float32Array(bytes(golden.probabilities))
    const kept = new Uint16Array(bytes(golden.kept))
    // What float64 sums cannot see is left out when no top_k bounds the candidates.
    const visible = (p: number) => p > 1e-13
    const ours = probabilities.filter(visible)
    const expected = oracle.filter(visible)
    if (golden.kind === 'ties' && golden.params.topP < 1) {
      // Which of equal tokens stay is up to the oracle's unstable sort: compare sets of values.
      ours.sort()
      expected.sort()
    } else {
      const ids = [...tokens].filter((_, i) => visible(probabilities[i]!))
      const expectedIds = [...kept].filter((_, i) => visible(oracle[i]!))
      assert.deepEqual(ids, expectedIds, name)
    }
    assert.equal(ours.length, expected.length, name)
    ours.forEach((p, i) => assert.ok(Math.abs(p - expected[i]!) < 1e-6, `${name} at ${i}`))
  }
})

const share = fc.double({ min: 0.001, max: 0.999, noNaN: true })
const paramsArbitrary = fc.record({
  temperature: fc.double({ min: 0.1, max: 3, noNaN: true }),
  topK: fc.oneof(fc.constant(0), fc.integer({ min: 1, max: 80 })),
  topP: fc.oneof(fc.constant(1), share),
  minP: fc.oneof(fc.constant(0), share),
  typicalP: fc.oneof(fc.constant(1), share),
  repetitionPenalty: fc.oneof(fc.constant(1), fc.double({ min: 0.5, max: 2, noNaN: true })),
  presencePenalty: fc.oneof(fc.constant(0), fc.double({ min: -2, max: 2, noNaN: true })),
  frequencyPenalty: fc.oneof(fc.constant(0), fc.double({ min: -2, max: 2, noNaN: true })),
  logitBias: fc.array(
    fc.tuple(fc.integer({ min: 0, max: 39 }), fc.double({ min: -5, max: 5, noNaN: true })),
    { maxLength: 4 },
  ),
  seed: fc.constant(0),
})

test('random logits and parameters give another distribution than the naive definition', () => {
  const tokens = fc.array(fc.integer({ min: 0, max: 39 }), { maxLength: 30 })
  const sizes = fc.integer({ min: 40, max: 300 })
  fc.assert(
    fc.property(sizes, fc.integer(), paramsArbitrary, tokens, tokens, (vocab, seed, p, i, o) => {
      const row = randomRow(vocab, seed)
      const before = row.slice()
      const ours = new Sampler(vocab).distribution(row, stateOf(p, i, o))
      assert.deepEqual(row, before, 'the row was not put back')
      const expected = referenceDistribution(row, p, i, o)
      const all = new Float64Array(vocab)
      ours.tokens.forEach((token, at) => (all[token] = ours.probabilities[at]!))
      for (let token = 0; token < vocab; token++) {
        assert.ok(Math.abs(all[token]! - expected[token]!) < 1e-6, `token ${token}`)
      }
    }),
    { seed: 7, numRuns: 400 },
  )
})

test('a nucleus of a large vocabulary is not what sorting gives', () => {
  const vocab = 20_011
  const sampler = new Sampler(vocab)
  for (const temperature of [0.05, 0.5, 1, 4]) {
    for (const topP of [0.01, 0.5, 0.95, 0.9999]) {
      const params = { ...T1, temperature, topP }
      const row = randomRow(vocab, temperature * 100 + topP)
      const ours = sampler.distribution(row, stateOf(params))
      const expected = referenceDistribution(row, params, [], [])
      const kept = expected.flatMap((p, token) => (p > 0 ? [token] : []))
      assert.deepEqual([...ours.tokens], kept, JSON.stringify({ temperature, topP }))
    }
  }
})

test('a draw is not the inverse of the cumulative distribution in order of ids', () => {
  const vocab = 5_003
  const sampler = new Sampler(vocab)
  for (const [name, params] of Object.entries(MODES)) {
    if (params.temperature === 0) continue
    const row = randomRow(vocab, 11)
    const p = referenceDistribution(row, params, [], [])
    const seed = 123
    const state = stateOf({ ...params, seed })
    const random = new RandomStream(seed)
    for (let draw = 0; draw < 300; draw++) {
      const u = random.uniform()
      let sum = 0
      const expected = p.findIndex((q) => (sum += q) > u)
      assert.equal(sampler.sample(row, state), expected, `${name}, draw ${draw}`)
    }
  }
})

test('sampled frequencies fail a chi-square test against the distribution', () => {
  const vocab = 200
  const sampler = new Sampler(vocab)
  const draws = 40_000
  for (const [name, params] of Object.entries(MODES)) {
    if (params.temperature === 0) continue
    const row = randomRow(vocab, 5, 1)
    const p = referenceDistribution(row, params, [], [])
    const counts = new Float64Array(vocab)
    const state = stateOf({ ...params, seed: 99 })
    for (let i = 0; i < draws; i++) counts[sampler.sample(row, state)]! += 1
    let chi = 0
    let cells = 0
    for (let token = 0; token < vocab; token++) {
      if (p[token] === 0) assert.equal(counts[token], 0, `${name}: filtered token ${token} drawn`)
      if (p[token]! * draws < 5) continue
      chi += (counts[token]! - p[token]! * draws) ** 2 / (p[token]! * draws)
      cells += 1
    }
    // Wilson–Hilferty: the cube root of chi²/dof is nearly normal. z < 4 is p > 3e-5.
    const dof = cells - 1
    const z = ((chi / dof) ** (1 / 3) - (1 - 2 / (9 * dof))) / Math.sqrt(2 / (9 * dof))
    assert.ok(z < 4, `${name}: chi² ${chi.toFixed(1)} with ${dof} degrees, z ${z.toFixed(2)}`)
  }
})

test('greedy misses the maximum somewhere, or a tie goes to a higher id', () => {
  for (const vocab of [1, 2, 31, 32, 33, 64, 100]) {
    const sampler = new Sampler(vocab)
    for (let at = 0; at < vocab; at++) {
      const row = new Float32Array(vocab).fill(-7)
      row[at] = -3
      row[vocab - 1] = -3
      assert.equal(sampler.sample(row, stateOf(GREEDY)), at)
    }
    assert.equal(sampler.sample(new Float32Array(vocab), stateOf(GREEDY)), 0)
  }
})

test('a row with NaN of either sign, infinity or no finite logit yields a token', () => {
  const vocab = 77
  const sampler = new Sampler(vocab)
  const failed = (error: unknown) =>
    error instanceof LatticeError && error.code === 'backend_failed'
  for (const [name, params] of Object.entries(MODES)) {
    for (const bits of [0x7fc00000, 0xffc00000, 0x7f800000]) {
      for (let at = 0; at < vocab; at++) {
        const row = randomRow(vocab, 3)
        new Uint32Array(row.buffer)[at] = bits
        const what = `${name}, ${bits.toString(16)} at ${at}`
        assert.throws(() => sampler.sample(row, stateOf(params)), failed, what)
        assert.throws(() => sampler.logprobs(row, 0, 5), failed, what)
      }
    }
    const nothing = new Float32Array(vocab).fill(-Infinity)
    assert.throws(() => sampler.sample(nothing, stateOf(params)), failed, name)
  }
})

test('a token at -Infinity is drawn, or the only one left is not', () => {
  const vocab = 130
  const sampler = new Sampler(vocab)
  for (const params of Object.values(MODES)) {
    const row = new Float32Array(vocab).fill(-Infinity)
    row[129] = -2
    assert.equal(sampler.sample(row, stateOf(params)), 129)
    row[64] = -2
    const state = stateOf(params)
    for (let i = 0; i < 50; i++) assert.ok([64, 129].includes(sampler.sample(row, state)))
  }
})

test('a vocabulary of equal logits is cut wrongly', () => {
  const vocab = 10_000
  const sampler = new Sampler(vocab)
  const row = new Float32Array(vocab).fill(1.5)
  const kept = (params: SamplingParams) => sampler.distribution(row, stateOf(params)).tokens.length
  assert.equal(kept({ ...T1, topK: 3 }), vocab, 'ties with the k-th stay')
  assert.equal(kept({ ...T1, topP: 0.25 }), vocab / 4)
  assert.equal(sampler.sample(row, stateOf({ ...T1, topP: 0 })), 0)
  assert.equal(kept({ ...T1, minP: 1 }), vocab)
  assert.equal(kept({ ...T1, typicalP: 0.2 }), vocab, 'ties with the last stay')
  assert.equal(sampler.logprobs(row, 0, 20).top.length, 20)
})

test('the tiniest or hugest temperature breaks arithmetic', () => {
  const sampler = new Sampler(50)
  const row = randomRow(50, 8)
  const best = sampler.sample(row, stateOf(GREEDY))
  for (const params of Object.values(MODES)) {
    if (params.temperature === 0) continue
    assert.equal(sampler.sample(row, stateOf({ ...params, temperature: 5e-324 })), best)
    assert.equal(sampler.sample(row, stateOf({ ...params, temperature: 1e-6 })), best)
    assert.ok(sampler.sample(row, stateOf({ ...params, temperature: 1e308 })) < 50)
  }
})

test("a sequence's tokens depend on what is sampled between them", () => {
  const vocab = 500
  const sampler = new Sampler(vocab)
  const rows = Array.from({ length: 40 }, (_, i) => randomRow(vocab, i, 1))
  for (const params of Object.values(MODES)) {
    const run = (seed: number, noise: boolean) => {
      const state = stateOf({ ...params, seed, presencePenalty: 0.5 })
      const other = stateOf({ ...T1, topP: 0.7, seed: 5 })
      return rows.map((row) => {
        if (noise) sampler.accept(other, sampler.sample(row, other))
        const token = sampler.sample(row, state)
        sampler.accept(state, token)
        return token
      })
    }
    assert.deepEqual(run(1, false), run(1, true))
    if (params.temperature > 0) assert.notDeepEqual(run(1, false), run(2, false))
  }
})

test('log-probabilities differ from a float64 log-softmax, or come in another order', () => {
  const vocab = 3_001
  const sampler = new Sampler(vocab)
  for (const spread of [0.1, 3, 30]) {
    const row = randomRow(vocab, 21, spread)
    const max = Math.max(...row)
    const norm = max + Math.log(row.reduce((sum, x) => sum + Math.exp(x - max), 0))
    const { logprob, top } = sampler.logprobs(row, 17, 20)
    assert.ok(Math.abs(logprob - (row[17]! - norm)) < 1e-6)
    const order = Array.from(row.keys()).toSorted((a, b) => row[b]! - row[a]! || a - b)
    assert.deepEqual(
      top.map((t) => t.token),
      order.slice(0, 20),
    )
    for (const t of top) assert.ok(Math.abs(t.logprob - (row[t.token]! - norm)) < 1e-6)
    assert.deepEqual(sampler.logprobs(row, 17, 0).top, [])
  }
  const small = Float32Array.of(1, 3, 3, 2)
  const p = softmax([...small])
  const { top } = new Sampler(4).logprobs(small, 0, 9)
  assert.deepEqual(
    top.map((t) => t.token),
    [1, 2, 3, 0],
  )
  top.forEach((t) => assert.ok(Math.abs(Math.exp(t.logprob) - p[t.token]!) < 1e-9))
})

test('a biased, penalised row is left changed, so that log-probabilities lie', () => {
  const vocab = 64
  const sampler = new Sampler(vocab)
  const params: SamplingParams = {
    ...T1,
    logitBias: [
      [3, 5],
      [3, -1],
      [9, -100],
    ],
    repetitionPenalty: 1.4,
    frequencyPenalty: 0.3,
  }
  const row = randomRow(vocab, 2)
  const before = row.slice()
  for (const temperature of [0, 1]) {
    sampler.sample(row, stateOf({ ...params, temperature }, [3, 4, 9], [3, 3, 5]))
    assert.deepEqual(row, before)
  }
})

test('a parameter out of range is taken, or the error does not name it', () => {
  const wrong: [string, Partial<SamplingParams>][] = [
    ['temperature', { temperature: -0.1 }],
    ['temperature', { temperature: NaN }],
    ['temperature', { temperature: Infinity }],
    ['top_k', { topK: -1 }],
    ['top_k', { topK: 1.5 }],
    ['top_p', { topP: 1.01 }],
    ['top_p', { topP: -0.1 }],
    ['min_p', { minP: 2 }],
    ['typical_p', { typicalP: 0 }],
    ['repetition_penalty', { repetitionPenalty: 0 }],
    ['presence_penalty', { presencePenalty: NaN }],
    ['frequency_penalty', { frequencyPenalty: Infinity }],
    ['seed', { seed: 0.5 }],
    ['seed', { seed: 2 ** 53 }],
    ['logit_bias', { logitBias: [[-1, 0]] }],
    ['logit_bias', { logitBias: [[1, NaN]] }],
  ]
  const names = (param: string) => (error: unknown) =>
    error instanceof LatticeError &&
    error.code === 'invalid_request' &&
    error.details['param'] === param
  for (const [param, change] of wrong) {
    assert.throws(() => new SamplerState({ ...T1, ...change }, []), names(param), param)
  }
  const state = stateOf({ ...T1, logitBias: [[64, 1]] })
  assert.throws(() => new Sampler(64).sample(randomRow(64, 1), state), names('logit_bias'))
})
