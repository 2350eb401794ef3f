// Catches a model that a GPU does not run: a launch with more threads or shared memory than there
// are, memory that is touched beyond its end, steps that nobody thought of. Of well-known models,
// by their widths, on GPUs of all kinds, in steps of all sizes.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { CudaBackend } from '../src/backends/cuda/backend.ts'
import { StepBatch } from '../src/backends/backend.ts'
import { CudaDevice } from '../src/backends/cuda/device.ts'
import { RELEASE_ROUNDS } from '../src/backends/cuda/forward.ts'
import { kernelsOf, keyOf } from '../src/backends/cuda/kernel-list.ts'
import { gpuKvLayout } from '../src/backends/cuda/kv-layout.ts'
import { type Quantization, whyNotFp8 } from '../src/backends/cuda/quantization.ts'
import { dummyModel } from '../src/model/dummy.ts'
import type { Architecture, Model, ModelConfig, TensorRef } from '../src/model/model.ts'
import { PlainKv } from './cuda/plain-kv.ts'
import { CheckedCuda } from './support/checked-cuda.ts'
import { temporaryDirectory } from './support/temporary.ts'

/** hidden, heads, kvHeads, headDim, feedForward, vocab */
type Sizes = readonly [number, number, number, number, number, number]

const MODELS: Readonly<Record<string, readonly [Architecture, Sizes]>> = {
  'SmolLM2 135M': ['llama', [576, 9, 3, 64, 1536, 49_152]],
  'SmolLM2 360M': ['llama', [960, 15, 5, 64, 2560, 49_152]],
  'SmolLM2 1.7B': ['llama', [2048, 32, 32, 64, 8192, 49_152]],
  'Llama 3.2 1B': ['llama', [2048, 32, 8, 64, 8192, 128_256]],
  'Llama 3.2 3B': ['llama', [3072, 24, 8, 128, 8192, 128_256]],
  'Llama 3.1 8B': ['llama', [4096, 32, 8, 128, 14_336, 128_256]],
  'Llama 3.1 70B': ['llama', [8192, 64, 8, 128, 28_672, 128_256]],
  'Llama 2 7B': ['llama', [4096, 32, 32, 128, 11_008, 32_000]],
  'Mistral 7B': ['llama', [4096, 32, 8, 128, 14_336, 32_768]],
  'Mistral Nemo 12B': ['llama', [5120, 32, 8, 128, 14_336, 131_072]],
  'TinyLlama 1.1B': ['llama', [2048, 32, 4, 64, 5632, 32_000]],
  'Granite 3 2B': ['llama', [2048, 32, 8, 64, 8192, 49_155]],
  'Phi 3 mini': ['llama', [3072, 32, 32, 96, 8192, 32_064]],
  'Qwen2.5 0.5B': ['qwen2', [896, 14, 2, 64, 4864, 151_936]],
  'Qwen2.5 1.5B': ['qwen2', [1536, 12, 2, 128, 8960, 151_936]],
  'Qwen2.5 7B': ['qwen2', [3584, 28, 4, 128, 18_944, 152_064]],
  'Qwen2.5 14B': ['qwen2', [5120, 40, 8, 128, 13_824, 152_064]],
  'Qwen3 0.6B': ['qwen3', [1024, 16, 8, 128, 3072, 151_936]],
  'Qwen3 1.7B': ['qwen3', [2048, 16, 8, 128, 6144, 151_936]],
  'Qwen3 4B': ['qwen3', [2560, 32, 8, 128, 9728, 151_936]],
  'Qwen3 8B': ['qwen3', [4096, 32, 8, 128, 12_288, 151_936]],
  'Qwen3 14B': ['qwen3', [5120, 40, 8, 128, 17_408, 151_936]],
  'Qwen3 32B': ['qwen3', [5120, 64, 8, 128, 25_600, 151_936]],
  'Gemma 3 1B': ['gemma3', [1152, 4, 1, 256, 6912, 262_144]],
  'Gemma 3 4B': ['gemma3', [2560, 8, 4, 256, 10_240, 262_208]],
  'Gemma 3 27B': ['gemma3', [5376, 32, 16, 128, 21_504, 262_208]],
}

/** Compute capability, multiprocessors, shared memory of a block. */
const GPUS: Readonly<Record<string, readonly [number, number, number]>> = {
  A100: [80, 108, 163 << 10],
  'RTX 3090': [86, 82, 99 << 10],
  L4: [89, 58, 99 << 10],
  H100: [90, 132, 227 << 10],
  'H100 PCIe': [90, 114, 227 << 10],
  H20: [90, 78, 227 << 10],
  B200: [100, 148, 227 << 10],
  'RTX 5090': [120, 170, 99 << 10],
}

const LAYERS = 2

function modelOf(name: string): Model {
  const [architecture, sizes] = MODELS[name]!
  const [hidden, heads, kvHeads, headDim, feedForward, vocab] = sizes
  const like = dummyModel('dummy:llama-3.1-8b')
  const gemma = architecture === 'gemma3'
  const rope = { ...like.config.rope, dimensions: headDim }
  const config: ModelConfig = {
    ...like.config,
    ...{ architecture, name, layers: LAYERS, hidden, heads, kvHeads, headDim, feedForward, vocab },
    ...{ rope, ropeLocal: gemma ? { ...rope, base: 10_000 } : undefined },
    slidingWindow: gemma ? { tokens: 512, layers: [true, false] } : undefined,
  }
  const tensors = new Map<string, TensorRef>()
  const add = (tensor: string, ...shape: number[]) => {
    const byteLength = shape.reduce((product, n) => product * n, 2)
    tensors.set(tensor, { name: tensor, type: 'BF16', shape, file: 0, offset: 0, byteLength })
  }
  add('token_embd.weight', hidden, vocab)
  add('output_norm.weight', hidden)
  for (let layer = 0; layer < LAYERS; layer++) {
    const of = (tensor: string, ...shape: number[]) => add(`blk.${layer}.${tensor}`, ...shape)
    const norms = gemma ? ['post_attention_norm', 'post_ffw_norm'] : []
    for (const norm of ['attn_norm', 'ffn_norm', ...norms]) of(`${norm}.weight`, hidden)
    if (gemma || architecture === 'qwen3') {
      for (const norm of ['attn_q_norm', 'attn_k_norm']) of(`${norm}.weight`, headDim)
    }
    for (const [part, count] of Object.entries({ q: heads, k: kvHeads, v: kvHeads })) {
      of(`attn_${part}.weight`, hidden, count * headDim)
      if (architecture === 'qwen2') of(`attn_${part}.bias`, count * headDim)
    }
    of('attn_output.weight', heads * headDim, hidden)
    for (const part of ['gate', 'up']) of(`ffn_${part}.weight`, hidden, feedForward)
    of('ffn_down.weight', feedForward, hidden)
  }
  return { ...like, config, tensors }
}

/** Tokens of each sequence in a step. */
const STEPS: readonly (readonly number[])[] = [
  ...[1, 2, 3, 4, 5, 7, 33, 65, 129].map((n) => Array<number>(n).fill(1)),
  ...[[2], [3], [4], [2, 1], [2, 2], [5], [63, 1], [64], [100, 1, 1], [128], [130]],
]
const LOGITS = [() => true, (slot: number) => slot % 2 === 0, () => false]

interface Limits {
  maxSequences: number
  stepTokens: number
}

const LIMITS: Limits = { maxSequences: 160, stepTokens: 704 }

function run(name: string, gpu: string, limits = LIMITS, quantization?: Quantization): void {
  const [capability, multiprocessors, sharedBytesPerBlock] = GPUS[gpu]!
  const { maxSequences, stepTokens } = limits
  const cuda = new CheckedCuda({ capability, multiprocessors, sharedBytesPerBlock })
  const model = modelOf(name)
  const backend = new CudaBackend(model, {
    device: CudaDevice.open(0, cuda),
    modules: cuda.images(temporaryDirectory('products')),
    kv: new PlainKv(cuda, gpuKvLayout(model.config, 64, 1 << 16), maxSequences),
    ...{ ...limits, quantization, lt: cuda.products() },
  })
  const { state, stream } = backend.forward
  Object.defineProperty(state, 'finished', { get: () => state.steps })
  const { captures } = cuda
  const list = kernelsOf(model, cuda.devices()[0]!, RELEASE_ROUNDS, maxSequences, quantization)
  const known = new Set(list.map(keyOf))
  assert.deepEqual(
    [...cuda.wanted].filter((kernel) => !known.has(kernel)),
    [],
    'not in the list',
  )
  const loaded = cuda.wanted.size
  const batch = new StepBatch(stepTokens, maxSequences)
  const tokens = new Int32Array(stepTokens)
  const all = Array<number>(maxSequences).fill(1)
  const full = [stepTokens + 1 - maxSequences, ...all.slice(1)]
  const fitting = STEPS.filter(
    (counts) =>
      counts.length <= maxSequences && counts.reduce((sum, n) => sum + n, 0) <= stepTokens,
  )
  for (const counts of [...fitting, all, full, [stepTokens]]) {
    for (const wants of LOGITS) {
      batch.clear()
      counts.forEach((count, slot) => batch.add(slot, 0, tokens, 0, count, wants(slot)))
      backend.launchChoosing(batch, false)
      cuda.synchronizeStream(stream)
    }
  }
  backend.close()
  assert.equal(cuda.captures, captures, 'graphs are there before the first step')
  assert.equal(cuda.wanted.size, loaded, 'and so are kernels')
  assert.ok(cuda.launches.get('sample')! > 0 && cuda.launches.get('embed')! > fitting.length)
}

for (const name of Object.keys(MODELS)) {
  for (const [gpu, [capability]] of Object.entries(GPUS)) {
    for (const quantization of [undefined, 'fp8'] as const) {
      if (quantization && whyNotFp8({ capability }) !== undefined) continue
      const how = quantization === undefined ? '' : `, ${quantization}`
      test(`${name} does not run on ${gpu}${how}`, () => run(name, gpu, LIMITS, quantization))
    }
  }
}

for (const name of ['SmolLM2 135M', 'Llama 3.1 8B', 'Qwen3 8B']) {
  for (const quantization of [undefined, 'fp8'] as const) {
    for (const [maxSequences, stepTokens] of [
      [1, 1],
      [1, 513],
      [3, 6],
      [7, 7],
      [33, 100],
      [65, 65],
      [100, 129],
      [129, 1000],
      [256, 2048],
      [512, 8192],
      [513, 2048],
      [1000, 1024],
    ] as const) {
      const how = `${maxSequences} sequences, steps of ${stepTokens}, ${quantization ?? 'bf16'}`
      test(`${name} does not run: ${how}`, () =>
        run(name, 'H100', { maxSequences, stepTokens }, quantization))
    }
  }
}

test('steps of more tokens than a launch has rows are begun', () => {
  const limits = { maxSequences: 1, stepTokens: 65_535 }
  run('SmolLM2 135M', 'H100', limits)
  assert.throws(() => run('SmolLM2 135M', 'H100', { ...limits, stepTokens: 65_536 }), {
    code: 'usage',
    todo: 'Give --step-tokens 65535 or fewer.',
  })
})
