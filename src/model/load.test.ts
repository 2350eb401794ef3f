import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import {
  encodeGguf,
  TINY_LLAMA,
  tinyLlama,
  type TinyGguf,
  type TinyTensor,
  type TinyValue,
  writeTinyGguf,
  xorshift,
} from '../../test/support/tiny-gguf.ts'
import { temporaryDirectory } from '../../test/support/temporary.ts'
import { LatticeError } from '../errors.ts'
import { memorySource } from './byte-source.ts'
import { parseGguf } from './gguf.ts'
import { modelFromGguf, openModel } from './load.ts'

function open(contents: TinyGguf) {
  const gguf = parseGguf(memorySource('/models/Tiny.gguf', encodeGguf(contents)))
  return modelFromGguf('/models/Tiny.gguf', [{ path: '/models/Tiny.gguf', gguf }])
}

function assertRefused(run: () => unknown, code: string, message: RegExp): void {
  assert.throws(run, (thrown) => {
    assert.ok(thrown instanceof LatticeError, String(thrown))
    assert.equal(thrown.code, code)
    assert.match(thrown.message, message)
    assert.ok(thrown.todo)
    return true
  })
}

const withMetadata = (metadata: Record<string, TinyValue>) => tinyLlama(1, metadata)

function withTensors(change: (tensors: TinyTensor[]) => TinyTensor[]): TinyGguf {
  const whole = tinyLlama()
  return { ...whole, tensors: change([...whole.tensors]) }
}

test('a Llama file opens with its sizes, files, tensors and template', () => {
  const path = writeTinyGguf(withMetadata({ 'tokenizer.chat_template': '{{ messages }}' }))
  const model = openModel(path)
  const { config } = model
  assert.deepEqual(
    { ...TINY_LLAMA, ...config },
    {
      ...TINY_LLAMA,
      architecture: 'llama',
      name: 'Tiny Llama',
      headDim: 16,
      normEps: Math.fround(1e-5),
      rope: { base: 10_000, dimensions: 16, pairing: 'interleaved', scaling: { kind: 'none' } },
      ropeLocal: undefined,
      slidingWindow: undefined,
      attentionScale: 0.25,
      embeddingScale: 1,
    },
  )
  assert.deepEqual([model.format, model.normWeightOffset], ['gguf', 0])
  assert.equal(model.chatTemplate, '{{ messages }}')
  assert.deepEqual(model.tensors.get('blk.1.ffn_down.weight')?.shape, [96, 64])
  assert.equal(model.files[0]?.path, path)
})

test('architectures and features that no program computes are refused by name', () => {
  const refused: [Record<string, TinyValue>, RegExp][] = [
    [{ 'general.architecture': 'mamba' }, /architecture "mamba" cannot be run/],
    [{ 'llama.expert_count': 8 }, /llama.expert_count is 8: mixture of experts/],
    [{ 'llama.attn_logit_softcapping': { type: 'f32', value: 50 } }, /soft-capping of attention/],
    [{ 'llama.final_logit_softcapping': { type: 'f32', value: 30 } }, /soft-capping of logits/],
    [{ 'llama.attention.causal': false }, /not causal/],
    [{ 'llama.rope.scaling.type': 'longrope' }, /rope scaling "longrope"/],
    [{ 'llama.rope.scaling.type': 'su' }, /rope scaling "su"/],
    [{ 'llama.attention.value_length': 8 }, /keys have 16 dimensions a head, values 8/],
    [{ 'llama.attention.head_count_kv': 3 }, /4 heads cannot share 3/],
    [{ 'llama.attention.head_count_kv': Int32Array.of(2, 1) }, /differs between layers/],
    [{ 'llama.block_count': 4_000_000_000 }, /4000000000 layers/],
    [{ 'llama.rope.dimension_count': 7 }, /rope turns 7 of 16/],
  ]
  for (const [metadata, message] of refused) {
    assertRefused(() => open(withMetadata(metadata)), 'model_unsupported', message)
  }
})

test('missing and mistyped keys are named', () => {
  const whole = tinyLlama()
  const { 'llama.embedding_length': _, ...without } = whole.metadata
  assertRefused(
    () => open({ ...whole, metadata: without }),
    'gguf_invalid',
    /llama.embedding_length is missing/,
  )
  const { 'general.architecture': __, ...nameless } = whole.metadata
  assertRefused(
    () => open({ ...whole, metadata: nameless }),
    'gguf_invalid',
    /general.architecture is missing/,
  )
  const text = withMetadata({ 'llama.context_length': 'long' })
  assertRefused(
    () => open(text),
    'gguf_invalid',
    /llama.context_length is not a non-negative integer/,
  )
})

test('tensors that are missing, misshapen, of no use or of no weight type are named', () => {
  const lack = (name: string) =>
    withTensors((tensors) => tensors.filter((one) => one.name !== name))
  assertRefused(
    () => open(lack('blk.1.attn_k.weight')),
    'model_unsupported',
    /not there: blk.1.attn_k.weight\./,
  )
  assertRefused(
    () => open(lack('token_embd.weight')),
    'model_unsupported',
    /no tensor token_embd.weight/,
  )
  const many = withTensors((tensors) => tensors.filter((one) => !one.name.startsWith('blk.0')))
  assertRefused(() => open(many), 'model_unsupported', /and 4 more/)
  const data = new Float32Array(64)
  const extra = (name: string) =>
    withTensors((tensors) => [...tensors, { name, shape: [64], data }])
  assertRefused(
    () => open(extra('blk.0.attn_q_norm.weight')),
    'model_unsupported',
    /attn_q_norm.weight is none/,
  )
  open(extra('blk.0.attn_q.bias'))
  const misshapen = withTensors((tensors) =>
    tensors.map((one) => (one.name === 'output_norm.weight' ? { ...one, shape: [8, 8] } : one)),
  )
  assertRefused(() => open(misshapen), 'model_unsupported', /shape \[8,8\], but .* \[64\]/)
  const integers = withTensors((tensors) =>
    tensors.map((one) => (one.name === 'output_norm.weight' ? { ...one, type: 'I32' } : one)),
  )
  assertRefused(() => open(integers), 'model_unsupported', /output_norm.weight is of type I32/)
})

test('rope scaling of every kind is read', () => {
  const scaling = (metadata: Record<string, TinyValue>) =>
    open(withMetadata(metadata)).config.rope.scaling
  const two = { type: 'f32', value: 2 } as const
  assert.deepEqual(scaling({ 'llama.rope.scaling.factor': two }), { kind: 'linear', factor: 2 })
  assert.deepEqual(scaling({ 'llama.rope.scale_linear': two }), { kind: 'linear', factor: 2 })
  assert.deepEqual(
    scaling({ 'llama.rope.scaling.type': 'none', 'llama.rope.scaling.factor': two }),
    { kind: 'none' },
  )
  const yarn = {
    'llama.rope.scaling.type': 'yarn',
    'llama.rope.scaling.factor': { type: 'f32', value: 4 },
    'llama.rope.scaling.original_context_length': 128,
  } as const
  assert.deepEqual(scaling(yarn), {
    kind: 'yarn',
    factor: 4,
    originalContext: 128,
    betaFast: 32,
    betaSlow: 1,
    attentionFactor: 1 + 0.1 * Math.log(4),
  })
})

test("Llama 3.1's divisors come from the tensor rope_freqs.weight", () => {
  const divisors = Float32Array.of(1, 1, 1, 2.5, 4, 8, 8, 8)
  const whole = tinyLlama()
  const tensors = [...whole.tensors, { name: 'rope_freqs.weight', shape: [8], data: divisors }]
  const { config } = openModel(writeTinyGguf({ ...whole, tensors }))
  assert.deepEqual(config.rope.scaling, { kind: 'factors', divisors })
  const both = withMetadata({ 'llama.rope.scaling.factor': { type: 'f32', value: 2 } })
  const path = writeTinyGguf({ ...both, tensors })
  assertRefused(() => openModel(path), 'model_unsupported', /both rope_freqs.weight and linear/)
})

/** A Gemma 3 of so many layers with all its tensors. */
function tinyGemma(layers: number, metadata: Record<string, TinyValue> = {}): TinyGguf {
  const tensor = (name: string, ...shape: number[]): TinyTensor => {
    const size = shape.reduce((product, dimension) => product * dimension, 1)
    return { name: `${name}.weight`, shape, data: new Float32Array(size) }
  }
  const layer = (at: string) => [
    ...['attn_norm', 'ffn_norm', 'post_attention_norm', 'post_ffw_norm'].map((n) =>
      tensor(`${at}.${n}`, 12),
    ),
    ...['attn_q_norm', 'attn_k_norm'].map((n) => tensor(`${at}.${n}`, 8)),
    tensor(`${at}.attn_q`, 12, 16),
    ...['attn_k', 'attn_v'].map((n) => tensor(`${at}.${n}`, 12, 8)),
    tensor(`${at}.attn_output`, 16, 12),
    ...['ffn_gate', 'ffn_up'].map((n) => tensor(`${at}.${n}`, 12, 4)),
    tensor(`${at}.ffn_down`, 4, 12),
  ]
  return {
    metadata: {
      'general.architecture': 'gemma3',
      'gemma3.block_count': layers,
      'gemma3.context_length': 64,
      'gemma3.embedding_length': 12,
      'gemma3.feed_forward_length': 4,
      'gemma3.attention.head_count': 2,
      'gemma3.attention.head_count_kv': 1,
      'gemma3.attention.key_length': 8,
      'gemma3.attention.value_length': 8,
      'gemma3.attention.layer_norm_rms_epsilon': { type: 'f32', value: 1e-6 },
      'gemma3.attention.sliding_window': 16,
      'gemma3.rope.freq_base': { type: 'f32', value: 1e6 },
      'gemma3.rope.scaling.type': 'linear',
      'gemma3.rope.scaling.factor': { type: 'f32', value: 8 },
      ...metadata,
    },
    tensors: [
      tensor('token_embd', 12, 5),
      tensor('output_norm', 12),
      ...Array.from({ length: layers }, (_, i) => layer(`blk.${i}`)).flat(),
    ],
  }
}

test("Gemma 3's local layers have their own rope, its scales are its own, 27B's differ", () => {
  const { config } = open(tinyGemma(7))
  assert.deepEqual(config.slidingWindow, {
    tokens: 16,
    layers: [true, true, true, true, true, false, true],
  })
  assert.deepEqual(config.rope.scaling, { kind: 'linear', factor: 8 })
  assert.deepEqual(config.ropeLocal, {
    base: 10_000,
    dimensions: 8,
    pairing: 'halves',
    scaling: { kind: 'none' },
  })
  assert.equal(config.name, 'Tiny')
  assert.deepEqual(
    [config.attentionScale, config.embeddingScale],
    [1 / Math.sqrt(8), Math.sqrt(12)],
  )
  assert.equal(open(tinyGemma(62)).config.attentionScale, 1 / Math.sqrt(6))
  const listed = { 'gemma3.attention.sliding_window_pattern': [false, true] }
  assert.deepEqual(open(tinyGemma(2, listed)).config.slidingWindow?.layers, [false, true])
  const plain = open(tinyGemma(2, { 'gemma3.attention.sliding_window': 0 })).config
  assert.deepEqual([plain.slidingWindow, plain.ropeLocal], [undefined, undefined])
})

test('a split file opens from any of its parts, and not if one is missing or foreign', () => {
  const whole = tinyLlama()
  const directory = temporaryDirectory('split')
  const path = (number: number) => join(directory, `m-0000${number}-of-00003.gguf`)
  const split = (number: number, metadata: TinyGguf['metadata']) => ({
    ...metadata,
    'split.no': { type: 'u16', value: number - 1 } as const,
    'split.count': { type: 'u16', value: 3 } as const,
  })
  const write = (number: number, tensors: readonly TinyTensor[], metadata: TinyGguf['metadata']) =>
    writeFileSync(path(number), encodeGguf({ metadata: split(number, metadata), tensors }))
  write(1, whole.tensors.slice(0, 2), whole.metadata)
  write(2, whole.tensors.slice(2, 9), {})
  assertRefused(() => openModel(path(1)), 'model_not_found', /m-00003-of-00003.gguf is one/)
  write(3, whole.tensors.slice(9), {})
  for (const number of [1, 2, 3]) {
    const model = openModel(path(number))
    assert.equal(model.tensors.size, whole.tensors.length)
    assert.equal(model.tensors.get('blk.1.ffn_down.weight')?.file, 2)
    assert.equal(model.files.length, 3)
  }
  write(3, whole.tensors.slice(8), {})
  assertRefused(() => openModel(path(1)), 'gguf_invalid', /which another part has too/)
  writeFileSync(path(3), encodeGguf({ metadata: split(2, {}), tensors: whole.tensors.slice(9) }))
  assertRefused(() => openModel(path(1)), 'gguf_invalid', /says it is part 2 of 3, its name says 3/)
})

test('a path that is no model says what to give instead', () => {
  assertRefused(() => openModel('/nowhere/at/all.gguf'), 'model_not_found', /there is no such file/)
  assertRefused(
    () => openModel('/nowhere/model.safetensors'),
    'model_not_found',
    /one file of a model/,
  )
  const empty = temporaryDirectory('empty')
  const pipe = join(empty, 'pipe.gguf')
  execFileSync('mkfifo', [pipe])
  assertRefused(() => openModel(pipe), 'model_not_found', /is not a file/)
  assertRefused(() => openModel(empty), 'model_not_found', /holds no model.safetensors/)
})

test('20,000 files with mutated metadata open or are refused with a typed error', () => {
  const seed = Number(process.env['LATTICE_SEED'] ?? 20_260_102)
  console.log(`seed ${seed}`)
  const random = xorshift(seed)
  const below = (count: number) => Math.floor(Math.abs(random()) * count)
  const base = encodeGguf(
    withMetadata({ 'tokenizer.ggml.tokens': [], 'tokenizer.ggml.token_type': new Int32Array() }),
  )
  const header = parseGguf(memorySource('base', base)).dataOffset
  const data = base.subarray(header)
  const outcomes = new Map<string, number>()
  for (let round = 0; round < 20_000; round++) {
    const bytes = Buffer.concat([base.subarray(0, header), data])
    for (let count = 1 + below(3); count > 0; count--) {
      const at = 24 + below(header - 28)
      if (below(2) === 0) bytes[at] = (bytes[at] ?? 0) ^ (1 << below(8))
      else bytes.writeUInt32LE(below(3) === 0 ? 2 ** 32 - 1 : below(70), at)
    }
    let outcome = 'opened'
    try {
      const gguf = parseGguf(memorySource('fuzz', bytes))
      modelFromGguf('fuzz', [{ path: 'fuzz', gguf }])
    } catch (thrown) {
      outcome = thrown instanceof LatticeError ? thrown.code : 'crash'
      if (outcome !== 'gguf_invalid' && outcome !== 'model_unsupported') {
        throw new Error(`seed ${seed}, round ${round}`, { cause: thrown })
      }
    }
    outcomes.set(outcome, (outcomes.get(outcome) ?? 0) + 1)
  }
  assert.ok(outcomes.size === 3, JSON.stringify([...outcomes]))
})
