// Catches a token that the CPU's sampler could not have drawn, draws with other chances, and tokens
// that depend on how many blocks share a row, or on how much of it they hold.

import assert from 'node:assert/strict'
import { after, test } from 'node:test'
import { GREEDY, type SamplingParams } from '../../src/engine/api.ts'
import { Sampler, SamplerState } from '../../src/engine/sampler.ts'
import { LogprobRing } from '../../src/backends/cuda/logprobs.ts'
import { SampleLaunch } from '../../src/backends/cuda/sample-launch.ts'
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

const KINDS = {
  /** Spread like a model's, some impossible. */
  spread: (i: number) => (i % 97 === 5 ? -Infinity : bell(8)),
  ties: () => Math.round(bell(8) * 4) / 4,
  /** Two values: more tokens than any list holds, and ties in all blocks. */
  flat: (i: number) => (i % 3 === 0 ? 1 : 1.001),
  same: () => 0.25,
  zeros: (i: number) => (i % 2 === 0 ? -0 : 0),
  /** All that counts lies in one warp's run, or in few. */
  crowd: (i: number, vocab: number) => bell(4) + (Math.floor((i * 50) / vocab) === 17 ? 20 : 0),
  rising: (i: number, vocab: number) => (i * 12) / vocab,
  single: (i: number, vocab: number) => (i === vocab - 1 ? 3 : -Infinity),
} as const

type Kind = keyof typeof KINDS

function bell(width: number): number {
  return (random.next() + random.next() + random.next() - 1.5) * width
}

function logitsOf(kind: Kind, vocab: number): Float32Array {
  return Float32Array.from({ length: vocab }, (_, i) => KINDS[kind](i, vocab))
}

const CASES: readonly (readonly [Kind, number])[] = [
  ['spread', 128256],
  ['ties', 5003],
  ['flat', 30000],
  ['crowd', 50257],
  ['rising', 20001],
  ['same', 9000],
  ['zeros', 4099],
  ['spread', 131],
  ['single', 12],
]

for (const [name, variant] of Object.entries(VARIANTS)) {
  for (const [kind, vocab] of CASES) {
    test(`${name}: a token that the CPU would not draw, of ${vocab} ${kind}`, () =>
      check({ ...GREEDY, ...variant, seed: 1234567890123 }, logitsOf(kind, vocab)))
  }
}

/** Blocks that may share a row. */
const BLOCKS = gpu.device.info.capability >= 90 ? [1, 2, 4, 8] : [1]

/** Launches for so many rows, by this many blocks each, which hold what they have room for. */
function run(args: readonly number[], rows: number, blocks?: number, room?: number): void {
  const { driver, kernels, device, stream } = gpu
  const launch = new SampleLaunch(driver, kernels.find, device.info, args).of(rows, blocks)
  if (room !== undefined) launch.sharedBytes(Math.min(room, launch.dynamicSharedBytes))
  driver.launch(launch, stream)
  driver.synchronizeStream(stream)
}

const DRAWS = 24
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
    run(args, 1, BLOCKS[draw % BLOCKS.length])
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

test('typical_p keeps no token of a row that is nearly flat', () =>
  check({ ...GREEDY, temperature: 2.006, typicalP: 0.168, seed: 683 }, logitsOf('flat', 128256)))

test('logits that no token can be chosen from go unnoticed', () => {
  for (const blocks of BLOCKS) {
    for (const bad of [NaN, Infinity]) {
      const logits = logitsOf('spread', 1000)
      logits[567] = bad
      assert.equal(tokenOf(logits, blocks), -1)
    }
    assert.equal(tokenOf(new Float32Array(1000).fill(-Infinity), blocks), -1)
  }
})

function tokenOf(logits: Float32Array, blocks: number): number {
  const vocab = logits.length
  const table = new SamplingTable(gpu.driver, gpu.kernels.find, 1, vocab, gpu.stream)
  const start = { params: GREEDY, prompt: new Int32Array(), output: new Int32Array() }
  table.begin(0, { ...start, topLogprobs: undefined }, gpu.stream)
  const tokens = gpu.poisoned(4)
  const args = [gpu.put(logits), vocab, gpu.put(Int32Array.of(0)), table.table]
  args.push(table.biasTokens, table.biases, table.counts, gpu.poisoned(vocab * 4), tokens)
  run([...args, gpu.poisoned(4), ...NO_REPORT], 1, blocks)
  table.close()
  return gpu.get(tokens, new Int32Array(1))[0]!
}

for (const top of [0, 1, 5, MAX_TOP_LOGPROBS]) {
  for (const [kind, vocab] of [
    ['ties', 50257],
    ['ties', 128256],
    ['ties', 33],
    ['rising', 30000],
    ['flat', 20000],
    ['spread', 4096],
  ] as const) {
    for (const blocks of BLOCKS) {
      test(`a log-probability is wrong, ${top} of ${vocab} ${kind}, by ${blocks}`, () =>
        checkLogprobs(top, logitsOf(kind, vocab), blocks))
    }
  }
}

function checkLogprobs(top: number, logits: Float32Array, blocks: number): void {
  const vocab = logits.length
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
  run(args, 2, blocks)
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

const MIXTURE: readonly Partial<SamplingParams>[] = Object.values(VARIANTS)

for (const vocab of [128256, 50257, 7003, 70]) {
  test(`tokens depend on who shares a row of ${vocab}, or how much is held, or on padding`, () => {
    const rows = 2 * MIXTURE.length
    const logits = new Float32Array(rows * vocab)
    const kinds = Object.keys(KINDS) as Kind[]
    for (let row = 0; row < rows; row++) {
      logits.set(logitsOf(kinds[row % kinds.length]!, vocab), row * vocab)
    }
    const table = new SamplingTable(gpu.driver, gpu.kernels.find, rows, vocab, gpu.stream)
    const ring = new LogprobRing(gpu.driver, rows)
    // Rows are not in the order of their slots, and every seventh pads.
    const slots = Int32Array.from({ length: rows }, (_, row) =>
      row % 7 === 3 ? -1 : rows - 1 - row,
    )
    const prompt = Int32Array.from({ length: 30 }, () => random.below(vocab))
    const at = gpu.put(logits)
    const slotOf = gpu.put(slots)
    const adjusted = gpu.poisoned(rows * vocab * 4)
    const chosen = (blocks: number, room: number) => {
      for (let slot = 0; slot < rows; slot++) {
        const params = { ...GREEDY, seed: 99 + slot, ...MIXTURE[slot % MIXTURE.length] }
        const topLogprobs = slot % 3 === 0 ? slot % 5 : undefined
        const start = { params, prompt, output: new Int32Array(), topLogprobs }
        table.begin(slot, start, gpu.stream)
        gpu.driver.synchronizeStream(gpu.stream)
      }
      const tokens = gpu.poisoned(rows * 4)
      const args = [at, vocab, slotOf, table.table, table.biasTokens, table.biases]
      args.push(table.counts, adjusted, tokens, gpu.poisoned(rows * 4))
      args.push(ring.address, PLACES, rows, gpu.put(BigUint64Array.of(0n)))
      const drawn: unknown[] = []
      for (let draw = 0; draw < 3; draw++) {
        run(args, rows, blocks, room)
        drawn.push([...gpu.get(tokens, new Int32Array(rows))])
        for (let row = 0; row < rows; row++) {
          if (slots[row]! < 0 || slots[row]! % 3 !== 0) continue
          const { logprob, top } = ring.of(0, row, slots[row]! % 5)
          drawn.push(logprob, top)
        }
      }
      return drawn
    }
    const want = chosen(1, 0)
    slots.forEach((slot, row) => {
      if (slot < 0) assert.equal((want[0] as number[])[row], -1, 'what pads is left alone')
    })
    for (const blocks of BLOCKS) {
      for (const room of [0, 32 << 10, 1 << 20]) {
        assert.deepEqual(chosen(blocks, room), want, `${blocks} blocks, ${room} bytes`)
      }
    }
    table.close()
    ring.close()
  })
}
