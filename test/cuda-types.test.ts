// Catches a tensor type that is turned into other bfloat16 numbers than it means, on the way from a
// file to a GPU: every type that a GGUF file may have, and every float type of safetensors, in one
// file or several. The GPU is a mocked one; what each type means is the gguf package's word.

import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { StepBatch } from '../src/backends/backend.ts'
import { CudaBackend } from '../src/backends/cuda/backend.ts'
import { CudaDevice } from '../src/backends/cuda/device.ts'
import { gpuKvLayout } from '../src/backends/cuda/kv-layout.ts'
import type { ModuleCache } from '../src/backends/cuda/module-cache.ts'
import { addressOf } from '../src/ffi/block.ts'
import { bf16Converter } from '../src/ffi/ggml-convert.ts'
import { GGML_TYPES, type GgmlType } from '../src/model/ggml-types.ts'
import { openModel } from '../src/model/load.ts'
import type { Model } from '../src/model/model.ts'
import { readSafetensors } from '../src/model/safetensors.ts'
import { Golden } from './arch/golden.ts'
import { TYPES, typedModel } from './arch/typed-model.ts'
import { PlainKv } from './cuda/plain-kv.ts'
import { MockCuda } from './support/mock-cuda.ts'
import { MockAttention, MockKernels } from './support/mock-kernels.ts'
import { encodeSafetensors, writeModelDirectory } from './support/tiny-safetensors.ts'

/** bfloat16 everywhere; a block that is read wrongly costs 0.1 and more. */
const TOLERANCE = 3e-2
const STEP_TOKENS = 40

const modules = {
  folder: '/nonexistent',
  get: () => ({ image: new Uint8Array(), log: undefined }),
} as unknown as ModuleCache

/** Logits after each of these positions, the last of them all tokens. */
function logitsOn(model: Model, tokens: readonly number[], positions: readonly number[]) {
  const cuda = new MockCuda({ pageBytes: 1 << 16, totalBytes: 1 << 30 })
  const kernels = new MockKernels(cuda, model.config)
  const layout = gpuKvLayout(model.config, 64, 1 << 16)
  const kv = new PlainKv(cuda, layout, 1)
  const backend = new CudaBackend(model, {
    device: CudaDevice.open(0, cuda),
    modules,
    kv,
    maxSequences: 1,
    stepTokens: STEP_TOKENS,
    tune: false,
    skinny: false,
    lt: kernels.lt,
    attention: () => new MockAttention(kernels, kv.address, layout),
  })
  const batch = new StepBatch(STEP_TOKENS, 1)
  let done = 0
  const rows = positions.map((position) => {
    batch.clear()
    batch.add(0, done, tokens, done, position + 1 - done, true)
    done = position + 1
    backend.launch(batch)
    return backend.collect()[0]!.slice()
  })
  backend.close()
  return rows
}

const FOLDER = join(import.meta.dirname, 'arch', 'goldens', 'types')
const HASHES = JSON.parse(
  readFileSync(join(import.meta.dirname, 'goldens', 'dequantized.json'), 'utf8'),
) as Record<string, string>

test('a type means other numbers than the gguf package says, or is rounded otherwise', () => {
  const { widen, convert } = bf16Converter()
  const known = new Set<string>()
  for (const name of TYPES) {
    const text = readFileSync(join(FOLDER, `${name}.json`), 'utf8')
    const { banks } = JSON.parse(text) as { banks: Record<GgmlType, string> }
    for (const [type, bank] of Object.entries(banks) as [GgmlType, string][]) {
      known.add(type)
      const raw = Uint8Array.from(Buffer.from(bank, 'base64'))
      const { blockSize, blockBytes } = GGML_TYPES[type]
      const floats = new Float32Array((raw.length / blockBytes) * blockSize)
      widen(type, addressOf(raw), addressOf(floats), floats.length)
      const hash = createHash('sha256').update(new Uint8Array(floats.buffer)).digest('hex')
      assert.equal(hash, HASHES[type], type)
      const halves = new Uint16Array(floats.length)
      convert(type, addressOf(raw), addressOf(halves), floats.length)
      assert.deepEqual(halves, rounded(floats), `${type} as bfloat16`)
    }
  }
  assert.deepEqual([...known].toSorted(), Object.keys(HASHES))
})

test('a file of several types is another model on a GPU', () => {
  const { path, tokens, expected } = typedModel('Q4_K_M')
  const [first] = expected
  const [row] = logitsOn(openModel(path), tokens, [first!.position])
  let [difference, size] = [0, 0]
  first!.row.forEach((value, i) => {
    difference += (row![i]! - value) ** 2
    size += value ** 2
  })
  const error = Math.sqrt(difference / size)
  assert.ok(error <= TOLERANCE, `relative error ${error}`)
})

/** To the nearest bfloat16, of two as near to the even one. */
function rounded(values: Float32Array): Uint16Array {
  const bits = new Uint32Array(values.slice().buffer)
  return Uint16Array.from(bits, (b) => (b + 0x7fff + ((b >>> 16) & 1)) >>> 16)
}

/** A golden model's weights as another type, in so many files. */
function rewritten(family: string, dtype: 'F32' | 'F16' | 'BF16', shards: number): string {
  const folder = join(import.meta.dirname, 'arch', 'goldens', family)
  const path = join(folder, 'model.safetensors')
  const file = Uint8Array.from(readFileSync(path))
  const tensors = readSafetensors(path).tensors.map(
    ({ name, shape, offset, byteLength, ...one }) => {
      assert.equal(one.dtype, 'F16')
      const halves = new Float16Array(file.buffer.slice(offset, offset + byteLength))
      return { name, shape, values: Float32Array.from(halves) }
    },
  )
  const part = (i: number) => `model-0000${i + 1}-of-0000${shards}.safetensors`
  const shardOf = new Map(tensors.map(({ name }, i) => [name, part(i % shards)]))
  const files = Array.from({ length: shards }, (_, i) => {
    const mine = tensors.filter(({ name }) => shardOf.get(name) === part(i))
    return [
      part(i),
      encodeSafetensors(mine.map((one) => ({ ...one, dtype, data: encoded(one.values, dtype) }))),
    ]
  })
  const text = (name: string) => [name, readFileSync(join(folder, name), 'utf8')]
  return writeModelDirectory({
    ...Object.fromEntries([...files, text('config.json'), text('tokenizer.json')]),
    'model.safetensors.index.json': { weight_map: Object.fromEntries(shardOf) },
  })
}

function encoded(values: Float32Array, dtype: 'F32' | 'F16' | 'BF16'): Uint8Array {
  if (dtype === 'F32') return new Uint8Array(values.slice().buffer)
  if (dtype === 'F16') return new Uint8Array(Float16Array.from(values).buffer)
  return new Uint8Array(rounded(values).buffer)
}

for (const dtype of ['F32', 'F16', 'BF16'] as const) {
  test(`a directory of ${dtype} in three files is another model on a GPU`, () => {
    const golden = new Golden('llama2')
    const model = openModel(rewritten('llama2', dtype, 3))
    assert.equal(model.files.length, 3)
    const { tokens } = golden.sequence(1)
    const positions = [11, 12, 30]
    logitsOn(model, tokens, positions).forEach((row, i) => {
      const error = golden.error(1, positions[i]!, row)
      assert.ok(error <= TOLERANCE, `position ${positions[i]}: relative error ${error}`)
    })
  })
}
