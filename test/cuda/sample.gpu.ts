// Catches a token that the CPU's sampler could not have drawn, or draws with other chances.

import assert from 'node:assert/strict'
import { after, test } from 'node:test'
import { GREEDY, type SamplingParams } from '../../src/engine/api.ts'
import { Sampler, SamplerState } from '../../src/engine/sampler.ts'
import { LogprobRing } from '../../src/backends/cuda/logprobs.ts'
import { SamplingTable } from '../../src/backends/cuda/sampling.ts'
import { PLACES } from '../../src/backends/cuda/state.ts'
import { MAX_TOP_LOGPROBS } from '../../src/limits.ts'
import { Gpu, Random } from './gpu.ts'

const gpu = new Gpu()
after(() => gpu[Symbol.dispose]())
const random = new Random(14)

const VARIANTS: Record<string, Partial<SamplingParams>> = {
  greedy: {},
  plain: { temperature: 0.8 },
  hot: { temperature: 3 },
  'top k': { temperature: 1, topK: 40 },
  'top k of one': { temperature: 1, topK: 1 },
  'top p': { temperature: 1, topP: 0.9 },
  'top p of nothing': { temperature: 1, topP: 0 },
  'min p': { temperature: 1, minP: 0.05 },
  typical: { temperature: 1, typicalP: 0.5 },
  'all filters': { temperature: 0.7, topK: 100, topP: 0.8, minP: 0.02, typicalP: 0.9 },
  penalties: {
    temperature: 1,
    repetitionPenalty: 1.3,
    presencePenalty: 0.5,
    frequencyPenalty: 0.3,
  },
  'bias and greed': {
    logitBias: [
      [3, 50],
      [5, -100],
    ],
    repetitionPenalty: 2,
  },
  bias: {
    temperature: 1,
    topP: 0.95,
    logitBias: [
      [7, 4],
      [8, 4],
      [7, 1],
    ],
  },
}

/** Logits that are spread like a model's, with ties; or all alike, which overflows lists. */
function logitsOf(kind: 'spread' | 'ties' | 'flat', vocab: number): Float32Array {
  return Float32Array.from({ length: vocab }, (_, i) => {
    if (kind === 'flat') return i % 3 === 0 ? 1 : 1.001
    const x = (random.next() + random.next() + random.next() - 1.5) * 8
    return kind === 'ties' ? Math.round(x * 4) / 4 : i % 97 === 5 ? -Infinity : x
  })
}

for (const [name, variant] of Object.entries(VARIANTS)) {
  for (const [kind, vocab] of [
    ['spread', 128256],
    ['ties', 5003],
    ['flat', 30000],
  ] as const) {
    test(`${name}: a token that the CPU would not draw, of ${vocab} ${kind}`, () =>
      check({ ...GREEDY, ...variant, seed: 1234567890123 }, logitsOf(kind, vocab)))
  }
}

const DRAWS = 24
const KINDS = 'aiaaaaaaaaaiia'
/** Nobody asks for log-probabilities. */
const NO_REPORT = [0, 1, 1, 0]

function check(params: SamplingParams, logits: Float32Array): void {
  const vocab = logits.length
  const prompt = Int32Array.from({ length: 30 }, () => random.below(Math.min(vocab, 200)))
  const table = new SamplingTable(gpu.driver, gpu.kernels.find, 2, vocab, gpu.stream)
  const slot = 1
  const start = { params, prompt, output: new Int32Array(), topLogprobs: undefined }
  table.begin(slot, start, gpu.stream)
  const row = gpu.put(logits)
  const adjusted = gpu.poisoned(vocab * 4)
  const tokens = gpu.poisoned(4)
  const last = gpu.poisoned(8)
  const args = [row, vocab, gpu.put(Int32Array.of(slot)), table.table, table.biasTokens]
  args.push(table.biases, table.counts, adjusted, tokens, last, ...NO_REPORT)
  const cpu = new Sampler(vocab)
  const state = new SamplerState(params, prompt)
  let different = 0
  for (let draw = 0; draw < DRAWS; draw++) {
    const { tokens: ids, probabilities } = cpu.distribution(logits, state)
    const want = cpu.sample(logits, state)
    gpu.run('sample.cu', 'sample', KINDS, args, [1], 1024)
    const [got] = gpu.get(tokens, new Int32Array(1))
    assert.equal(gpu.get(last, new Int32Array(2))[slot], got)
    const chance = probabilities[ids.indexOf(got!)] ?? 0
    assert.ok(chance > 0, `token ${got} has no chance (the CPU drew ${want})`)
    // Weights of float32 place the borders between tokens a little elsewhere.
    if (got !== want) different++
    // Both go on with the same token, so that penalties stay comparable.
    state.accept(got!)
  }
  const near = params.temperature === 0 ? 0 : 2
  assert.ok(different <= near, `${different} of ${DRAWS} draws differ from the CPU's`)
  table.close()
}

test('logits that no token can be chosen from go unnoticed', () => {
  for (const bad of [NaN, Infinity]) {
    const logits = logitsOf('spread', 1000)
    logits[567] = bad
    assert.equal(tokenOf(logits), -1)
  }
  assert.equal(tokenOf(new Float32Array(1000).fill(-Infinity)), -1)
})

function tokenOf(logits: Float32Array): number {
  const vocab = logits.length
  const table = new SamplingTable(gpu.driver, gpu.kernels.find, 1, vocab, gpu.stream)
  const start = { params: GREEDY, prompt: new Int32Array(), output: new Int32Array() }
  table.begin(0, { ...start, topLogprobs: undefined }, gpu.stream)
  const tokens = gpu.poisoned(4)
  const args = [gpu.put(logits), vocab, gpu.put(Int32Array.of(0)), table.table]
  args.push(table.biasTokens, table.biases, table.counts, gpu.poisoned(vocab * 4), tokens)
  gpu.run('sample.cu', 'sample', KINDS, [...args, gpu.poisoned(4), ...NO_REPORT], [1], 1024)
  table.close()
  return gpu.get(tokens, new Int32Array(1))[0]!
}

for (const top of [0, 1, 5, MAX_TOP_LOGPROBS]) {
  for (const vocab of [50257, 128256, 33]) {
    test(`a log-probability is wrong, ${top} of ${vocab}`, () => checkLogprobs(top, vocab))
  }
}

function checkLogprobs(top: number, vocab: number): void {
  const logits = logitsOf('ties', vocab)
  const table = new SamplingTable(gpu.driver, gpu.kernels.find, 2, vocab, gpu.stream)
  // What is asked for is the model's own distribution, whatever a token is chosen from.
  const params = { ...GREEDY, temperature: 1, seed: 7, logitBias: [[11, 9]] } as SamplingParams
  const start = { params, prompt: new Int32Array(), output: new Int32Array() }
  table.begin(0, { ...start, topLogprobs: undefined }, gpu.stream)
  table.begin(1, { ...start, topLogprobs: top }, gpu.stream)
  const ring = new LogprobRing(gpu.driver, 2)
  const both = new Float32Array(2 * vocab)
  both.set(logits)
  both.set(logits, vocab)
  const rows = gpu.put(both)
  const tokens = gpu.poisoned(8)
  const args = [rows, vocab, gpu.put(Int32Array.of(0, 1)), table.table, table.biasTokens]
  args.push(table.biases, table.counts, gpu.poisoned(vocab * 8), tokens, gpu.poisoned(8))
  const step = PLACES + 2
  args.push(ring.address, PLACES, 2, gpu.put(BigUint64Array.of(BigInt(step))))
  gpu.run('sample.cu', 'sample', KINDS, args, [2], 1024)
  const got = ring.of(step, 1, top)
  assert.equal(ring.of(step, 0, 0).logprob, 0, 'who asks for none costs nothing')
  table.close()
  const chosen = gpu.get(tokens, new Int32Array(2))[1]!
  const want = new Sampler(vocab).logprobs(logits, chosen, top)
  ring.close()
  assert.ok(Math.abs(got.logprob - want.logprob) < 1e-5)
  assert.deepEqual(
    got.top.map(({ token }) => token),
    want.top.map(({ token }) => token),
  )
  want.top.forEach(({ logprob }, i) => assert.ok(Math.abs(got.top[i]!.logprob - logprob) < 1e-5))
}
