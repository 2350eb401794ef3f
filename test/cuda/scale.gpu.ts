// Catches what only the sizes of real models show: a step whose logits are not those of the matrix
// library, whatever steps came before it, of however many rows, with and without prompts; one whose
// bits depend on what lay in memory before; tokens far out, or far from the memory's first address.
// All memory is NaN but where tokens are.

import assert from 'node:assert/strict'
import { after, test } from 'node:test'
import { StepBatch } from '../../src/backends/backend.ts'
import { CudaBackend } from '../../src/backends/cuda/backend.ts'
import { compileAhead } from '../../src/backends/cuda/compile-ahead.ts'
import {
  CudaForward,
  type ForwardOptions,
  RELEASE_ROUNDS,
} from '../../src/backends/cuda/forward.ts'
import { kernelsOf } from '../../src/backends/cuda/kernel-list.ts'
import { gpuKvLayout } from '../../src/backends/cuda/kv-layout.ts'
import { whyNotFp8 } from '../../src/backends/cuda/quantization.ts'
import { dummyModel } from '../../src/model/dummy.ts'
import type { KvLayout } from '../../src/kv/layout.ts'
import type { Model } from '../../src/model/model.ts'
import { shuffle } from './attention.ts'
import { Gpu, Random } from './gpu.ts'
import { PlainKv } from './plain-kv.ts'
import { ReferenceAttention } from './reference-attention.ts'

const gpu = new Gpu()
after(() => gpu[Symbol.dispose]())

/** As served, but for what measurements would choose. */
const SERVED = { tune: false, hopperAlways: true } as const
/** Of bf16 over few blocks; and where a number next to a border of e4m3 takes another step. */
const TOLERANCE = { bf16: 3.5e-2, fp8: 0.16 }
/** bf16 of 16 bits. */
const NAN = 0x7fc0
const ONE = 0x3f80
const SLOTS = 160
const SLOT_TOKENS = 512
const STEP_TOKENS = 704
/** Rows of steps, from and to. */
const ROWS = [
  [1, 4],
  [5, 64],
  [65, 128],
  [129, STEP_TOKENS],
] as const
const KINDS = ['all decode', 'some logits', 'prompts beside', 'prompts only'] as const
/** Times that each kind comes in each size. */
const ROUNDS = 3
const PROMPT_MAX = 300

type Options = Omit<ForwardOptions, 'device' | 'modules' | 'kv' | 'maxSequences' | 'stepTokens'>

/** The matrix library, attention by its definition, and little kernels between them. */
function onLibrary({ config }: Model, layout: KvLayout): Options {
  const attention: Options['attention'] = (state, find) =>
    new ReferenceAttention(gpu.driver, config, layout, state, find)
  return { tune: false, skinny: false, wholeSteps: false, attention }
}

/**
 * A model's first blocks, at its widths. Random weights give nearly equal scores; these differ
 * enough for a single token to matter.
 */
function shallow(name: string, layers: number, sharper: number): Model {
  const model = dummyModel(name)
  const attentionScale = model.config.attentionScale * sharper
  return { ...model, config: { ...model.config, layers, attentionScale } }
}

function relativeError(got: Float32Array, want: Float32Array): number {
  let error = 0
  let norm = 0
  for (let i = 0; i < want.length; i++) {
    const [x, y] = [got[i]!, want[i]!]
    error += (x - y) * (x - y)
    norm += y * y
  }
  return Math.sqrt(error / norm)
}

interface Part {
  slot: number
  start: number
  tokens: readonly number[]
  wants: boolean
}

/** A model in one of the ways that it is computed, with KV memory of its own. */
class Side {
  readonly backend: CudaBackend
  private readonly kv: PlainKv
  private readonly batch: StepBatch

  constructor(model: Model, optionsOf: (layout: KvLayout) => Options, maxSequences = SLOTS) {
    const { device, modules, driver, stream } = gpu
    this.kv = new PlainKv(driver, gpuKvLayout(model.config, SLOT_TOKENS), maxSequences)
    this.kv.fill(NAN, stream)
    this.batch = new StepBatch(STEP_TOKENS, maxSequences)
    const limits = { maxSequences, stepTokens: STEP_TOKENS }
    const options = { ...limits, ...optionsOf(this.kv.layout) }
    this.backend = new CudaBackend(model, { device, modules, kv: this.kv, ...options })
  }

  /**
   * Logits of all parts that want them, row by row.
   * @param before what memory is full of that a step has for itself
   */
  step(parts: readonly Part[], before = NAN): Float32Array {
    const { backend, batch } = this
    const { forward, vocab } = backend
    const { driver, stream } = { driver: gpu.driver, stream: forward.stream }
    const arenaBytes = Math.max(forward.decoding.buffers.bytes, forward.mixed.buffers.bytes)
    driver.fill16(forward['arena'], before, arenaBytes / 2, stream)
    driver.fill8(forward.logits, 0xff, this.kv.slots * vocab * 4, stream)
    const e4m3 = forward['e4m3']
    if (e4m3) driver.fill16(e4m3.raw, before, (e4m3.scales - e4m3.raw) / 2, stream)
    batch.clear()
    let outputs = 0
    for (const { slot, start, tokens, wants } of parts) {
      batch.add(slot, start, tokens, 0, tokens.length, wants)
      if (wants) outputs++
    }
    backend.launch(batch)
    const [first] = backend.collect()
    return new Float32Array(first!.buffer, first!.byteOffset, outputs * vocab).slice()
  }

  /** A slot's sequence has ended. */
  clear(slot: number): void {
    const { slotBytes } = this.kv.layout
    const { stream } = this.backend.forward
    gpu.driver.fill16(this.kv.address + slot * slotBytes, NAN, slotBytes / 2, stream)
  }
}

/** Sequences that come, grow by steps of all kinds, and end. */
class Schedule {
  private readonly random: Random
  private readonly vocab: number
  private readonly lengths = new Int32Array(SLOTS)
  private readonly sides: readonly Side[]

  constructor(seed: number, vocab: number, sides: readonly Side[]) {
    this.random = new Random(seed)
    this.vocab = vocab
    this.sides = sides
  }

  /** Long prompts for a quarter of the slots; then every kind of step in every size, mixed. */
  *steps(): Generator<{ name: string; parts: Part[] }> {
    for (let slot = 0; slot < SLOTS / 4; slot += 4) {
      const counts = [0, 1, 2, 3].map(() => 10 + this.random.below(166))
      yield { name: 'long prompts', parts: counts.map((n, i) => this.part(slot + i, n, true)) }
    }
    for (let round = 0; round < ROUNDS; round++) {
      const cells = ROWS.flatMap((rows) => KINDS.map((kind) => ({ rows, kind })))
      shuffle(cells, this.random)
      for (const { rows, kind } of cells) {
        yield { name: `${rows.join('–')} rows, ${kind}`, parts: this.partsOf(rows, kind) }
      }
    }
  }

  private partsOf([least, most]: readonly [number, number], kind: (typeof KINDS)[number]): Part[] {
    const { random } = this
    const slots = Array.from({ length: SLOTS }, (_, slot) => slot)
    shuffle(slots, random)
    const next = (count: number, wants: boolean) => this.part(slots.pop()!, count, wants)
    if (!kind.startsWith('prompts')) {
      const from = Math.min(most, SLOTS) + 1 - least
      const rows = least + random.below(from)
      const all = kind === 'all decode'
      return Array.from({ length: rows }, () => next(1, all || random.next() < 0.7))
    }
    let left = Math.max(least, 2) + random.below(most + 1 - Math.max(least, 2))
    const singles = kind === 'prompts only' ? 0 : random.below(Math.min(left - 1, SLOTS / 2))
    const parts = Array.from({ length: singles }, () => next(1, random.next() < 0.7))
    left -= singles
    while (left > 0) {
      const count = Math.min(left, 2 + random.below(PROMPT_MAX - 1))
      // No prompt of one token is left over.
      const whole = left - count === 1 ? left : count
      parts.push(next(whole, random.next() < 0.7))
      left -= whole
    }
    shuffle(parts, random)
    return parts
  }

  /** The next tokens of a slot's sequence, or the first of another's. */
  private part(slot: number, count: number, wants: boolean): Part {
    const { random, lengths } = this
    let start = lengths[slot]!
    if (start + count > SLOT_TOKENS - 2 || (start > 0 && random.next() < 0.03)) {
      for (const side of this.sides) side.clear(slot)
      start = 0
    }
    lengths[slot] = start + count
    const tokens = Array.from({ length: count }, () => random.below(this.vocab))
    return { slot, start, tokens, wants }
  }
}

/** Largest relative errors, by test and kind of step. */
const worst: Record<string, Record<string, number>> = {}
after(() => {
  const short = (_: string, value: unknown) =>
    typeof value === 'number' ? value.toExponential(1) : value
  console.log('largest relative errors:', JSON.stringify(worst, short))
})

/** Fails unless a step's result is near that of the reference. */
function near(of: string, kind: string, error: number, tolerance: number, what: string): void {
  const kinds = (worst[of] ??= {})
  if (!(error <= (kinds[kind] ?? 0))) kinds[kind] = error
  assert.ok(error <= tolerance, `${kind}: ${what} is off by ${error}`)
}

interface Sides {
  served: Side
  reference: Side
}

/**
 * Computes a step in both ways.
 * @param again how often it is repeated: each time with the same bits
 * @param apart what the reference computes by itself
 */
function compareStep(
  { served, reference }: Sides,
  parts: readonly Part[],
  again: number,
  apart: (parts: readonly Part[]) => readonly (readonly Part[])[],
  check: (error: number, output: number) => void,
): void {
  const { vocab } = served.backend
  const got = served.step(parts)
  for (let i = 0; i < again; i++) {
    const bits = served.step(parts, ONE)
    const same = Buffer.compare(new Uint8Array(bits.buffer), new Uint8Array(got.buffer)) === 0
    assert.ok(same, 'other bits the next time')
  }
  const want = apart(parts).map((some) => reference.step(some))
  let output = 0
  for (const logits of want) {
    for (let at = 0; at < logits.length; at += vocab, output++) {
      const own = got.subarray(output * vocab, (output + 1) * vocab)
      check(relativeError(own, logits.subarray(at, at + vocab)), output)
    }
  }
}

const together = (parts: readonly Part[]) => [parts]
const oneByOne = (parts: readonly Part[]) => parts.map((part) => [part])

/** Runs a schedule; `apart` is how the reference computes a step. */
function compare(
  what: string,
  sides: Sides,
  tolerance: number,
  apart: typeof together | typeof oneByOne,
): void {
  const random = new Random(7)
  const { served, reference } = sides
  const schedule = new Schedule(19, served.backend.vocab, [served, reference])
  for (const { name, parts } of schedule.steps()) {
    const shape = parts.map(({ start, tokens }) => `${start}+${tokens.length}`).join(' ')
    compareStep(sides, parts, 1 + random.below(2), apart, (error, output) =>
      near(what, name, error, tolerance, `output ${output} of ${shape}`),
    )
  }
}

for (const [name, sharper] of [
  ['dummy:llama-3.1-8b', 4],
  ['dummy:qwen3-8b', 2],
] as const) {
  test(`${name}: steps of all kinds are not the library's`, () => {
    const model = shallow(name, 4, sharper)
    compileFor(model)
    const served = new Side(model, () => SERVED)
    const reference = new Side(model, (layout) => onLibrary(model, layout))
    const { decoding } = served.backend.forward
    const whole = name.includes('llama') ? [1, 2, 4, 5, 64] : []
    for (const rows of whole) assert.equal(decoding.whyNotWhole(rows), undefined)
    compare(name, { served, reference }, TOLERANCE.bf16, together)
    served.backend.close()
    reference.backend.close()
  })
}

test('steps in fp8 are not what their parts are one by one', (t) => {
  const problem = whyNotFp8(gpu.device.info)
  if (problem !== undefined) return t.skip(problem)
  const model = shallow('dummy:llama-3.1-8b', 4, 1)
  const quantization = 'fp8'
  const served = new Side(model, () => ({ ...SERVED, quantization }))
  const reference = new Side(model, (layout) => ({ ...onLibrary(model, layout), quantization }))
  compare('fp8', { served, reference }, TOLERANCE.fp8, oneByOne)
  served.backend.close()
  reference.backend.close()
})

test('more sequences than graphs were thought of are not decoded as the library does', () => {
  const model = shallow('dummy:llama-3.1-8b', 2, 4)
  const most = 600
  const served = new Side(model, () => SERVED, most)
  const reference = new Side(model, (layout) => onLibrary(model, layout), most)
  const random = new Random(29)
  const counts = [most, most - 1, 513]
  counts.forEach((count, start) => {
    const parts = Array.from({ length: count }, (_, slot) => {
      return { slot, start, tokens: [random.below(served.backend.vocab)], wants: true }
    })
    compareStep({ served, reference }, parts, 1, together, (error, output) =>
      near('many', `${count} rows`, error, TOLERANCE.bf16, `output ${output}`),
    )
  })
  served.backend.close()
  reference.backend.close()
})

/** Where sequences end, in KV memory of all 32 blocks: 128 KiB a token, 5.4 GB a sequence. */
const FAR = [40_900, 32_768, 33_111, 8_191, 17, 40_001]
const FAR_TOKENS = 40_960
/** Rows that decode, and a prompt's tokens, which are of the first sequence. */
const FAR_STEPS = [
  [1, 0],
  [2, 0],
  [3, 0],
  [4, 0],
  [5, 0],
  [6, 0],
  [0, 40],
  [3, 40],
  [5, 3],
  [0, 3],
] as const

test('tokens far out are not where they should be', (t) => {
  const { driver, device, modules } = gpu
  const model = shallow('dummy:llama-3.1-8b', 2, 4)
  const { layers } = model.config
  const layout = gpuKvLayout(dummyModel('dummy:llama-3.1-8b').config, FAR_TOKENS)
  const { slotBytes, tokenStride } = layout
  assert.ok(FAR[0]! * tokenStride > 2 ** 32)
  const address = driver.allocate(slotBytes * FAR.length)
  t.after(() => driver.free(address))
  const limits = { maxSequences: FAR.length, stepTokens: 64 }
  const kv = { address, layout, regions: FAR.length }
  const make = (options: Options) =>
    new CudaForward(model, { device, modules, kv, ...limits, ...options })
  const [served, reference] = [make(SERVED), make(onLibrary(model, layout))]
  driver.fill16(address, NAN, (slotBytes * FAR.length) / 2, served.stream)
  FAR.forEach((tokens, slot) => {
    served.fillRandom(address + slot * slotBytes, (tokens * tokenStride) / 2, slot, 1)
  })
  driver.synchronizeStream(served.stream)
  const used = [...FAR]
  for (const [singles, prompt] of FAR_STEPS) {
    const slots = FAR.map((_, slot) => slot).slice(prompt > 0 ? 1 : 0)
    const rows = Array.from({ length: singles }, (_, i) => slots[i]!)
    const parts = [
      ...rows.map((slot) => ({ slot, start: used[slot]!, count: 1 })),
      ...(prompt > 0 ? [{ slot: 0, start: used[0]! - prompt, count: prompt }] : []),
    ]
    // Bits of keys and values as they were appended, and logits.
    const run = (forward: CudaForward) => {
      const { state, vocab, stream } = forward
      driver.fill8(forward.logits, 0xff, parts.length * vocab * 4, stream)
      let row = 0
      parts.forEach(({ slot, start, count }, output) => {
        if (count > 1) state.setSegment(0, row, start, count, slot)
        for (let i = 0; i < count; i++, row++) {
          const wanted = i === count - 1 ? output : -1
          state.setRow(row, (37 * (start + i)) % vocab, start + i, slot, wanted, slot)
        }
      })
      const shape = { tokens: row, outputs: parts.length, singles, segments: prompt > 0 ? 1 : 0 }
      for (let i = row; prompt === 0 && i < forward.bucketOf(row); i++) {
        state.setRow(i, 0, 0, -1, i, 0)
      }
      state.wait(prompt === 0 ? forward.decode(row) : forward.step(shape, false))
      const logits = gpu.get(forward.logits, new Float32Array(parts.length * vocab))
      const bytes = layers * layout.layerStride
      const kept = parts.map(({ slot, start, count }) => {
        const last = address + slot * slotBytes + (start + count - 1) * tokenStride
        return gpu.bf16(last, bytes / 2)
      })
      return { logits, kept }
    }
    const want = run(reference)
    const got = run(served)
    parts.forEach(({ slot, start, count }, i) => {
      const { vocab } = served
      const of = (logits: Float32Array) => logits.subarray(i * vocab, (i + 1) * vocab)
      const kind = `${singles} rows and ${prompt}`
      const where = `${count} tokens from ${start} on`
      const ofLogits = relativeError(of(got.logits), of(want.logits))
      near('far out', kind, ofLogits, TOLERANCE.bf16, `logits of ${where}`)
      const ofKept = relativeError(got.kept[i]!, want.kept[i]!)
      near('far out, keys and values', kind, ofKept, TOLERANCE.bf16, `KV of ${where}`)
      if (count === 1) used[slot] = start + 1
    })
  }
  served.close()
  reference.close()
})

/** At once on all cores. */
function compileFor(model: Model): void {
  const { device, modules } = gpu
  const kernels = kernelsOf(model, device.info, RELEASE_ROUNDS, SLOTS)
  compileAhead(modules, kernels, device.architecture)
}
