// Owns a Llama whose matrices are all of one tensor type: their rows come from a golden file, in
// the order that tools/goldens/arch_types.py chose too.

import { globSync, readFileSync } from 'node:fs'
import { basename, join } from 'node:path'
import { Random } from '../support/random.ts'
import { type TinyTensor, writeTinyGguf } from '../support/tiny-gguf.ts'
import { StepBatch } from '../../src/backends/backend.ts'
import { CpuBackend } from '../../src/backends/cpu/backend.ts'
import { GGML_TYPES, type GgmlType } from '../../src/model/ggml-types.ts'
import { openModel } from '../../src/model/load.ts'

const [VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM] = [287, 256, 4, 2, 64]

const MATRICES: readonly (readonly [name: string, rows: number])[] = [
  ['token_embd', VOCAB],
  ['blk.0.attn_q', HEADS * HEAD_DIM],
  ['blk.0.attn_k', KV_HEADS * HEAD_DIM],
  ['blk.0.attn_v', KV_HEADS * HEAD_DIM],
  ['blk.0.attn_output', HIDDEN],
  ['blk.0.ffn_gate', HIDDEN],
  ['blk.0.ffn_up', HIDDEN],
  ['blk.0.ffn_down', HIDDEN],
  ['output', VOCAB],
]
const NORMS = ['blk.0.attn_norm', 'blk.0.ffn_norm', 'output_norm']

const METADATA = {
  'general.architecture': 'llama',
  'llama.block_count': 1,
  'llama.context_length': 64,
  'llama.embedding_length': HIDDEN,
  'llama.feed_forward_length': HIDDEN,
  'llama.attention.head_count': HEADS,
  'llama.attention.head_count_kv': KV_HEADS,
  'llama.attention.layer_norm_rms_epsilon': { type: 'f32', value: 1e-5 },
} as const

const BANK_ROWS = 24

interface TypeGolden {
  /** Of each matrix, by its name without the layer. */
  types: Readonly<Record<string, GgmlType>>
  seed: number
  /** BANK_ROWS rows of each type. */
  banks: Readonly<Record<string, string>>
  positions: number[]
  logits: string
}

const FOLDER = join(import.meta.dirname, 'goldens', 'types')

/** Every type that has a golden, and Q4_K_M: a mixture. */
export const TYPES = globSync('*.json', { cwd: FOLDER }).map((file) => basename(file, '.json'))

export interface TypedModel {
  path: string
  tokens: number[]
  /** Where logits are known, and what they are. */
  expected: readonly { position: number; row: Float16Array }[]
}

/** @param changed types of some tensors by name, instead of the golden's; contents are zeros. */
export function typedModel(
  type: string,
  changed: Readonly<Record<string, GgmlType>> = {},
): TypedModel {
  const golden = JSON.parse(readFileSync(join(FOLDER, `${type}.json`), 'utf8')) as TypeGolden
  const random = new Random(golden.seed)
  const tensors: TinyTensor[] = MATRICES.map(([name, rows]) => {
    const type = golden.types[name.replace('blk.0.', '')]!
    const bank = Buffer.from(golden.banks[type]!, 'base64')
    const rowBytes = bank.byteLength / BANK_ROWS
    const chosen = Array.from({ length: rows }, () => {
      const row = random.below(BANK_ROWS) * rowBytes
      return bank.subarray(row, row + rowBytes)
    })
    return { name: `${name}.weight`, shape: [HIDDEN, rows], type, data: Buffer.concat(chosen) }
  })
  for (const name of NORMS) {
    const data = Float32Array.from({ length: HIDDEN }, () => 0.5 + random.below(256) / 256)
    tensors.push({ name: `${name}.weight`, shape: [HIDDEN], data })
  }
  const tokens = Array.from({ length: 40 }, () => random.below(VOCAB))
  const logits = new Float16Array(new Uint8Array(Buffer.from(golden.logits, 'base64')).buffer)
  return {
    path: writeTinyGguf({
      metadata: METADATA,
      tensors: tensors.map((tensor) => retyped(tensor, changed[tensor.name])),
    }),
    tokens,
    expected: golden.positions.map((position, i) => ({
      position,
      row: logits.subarray(i * VOCAB, (i + 1) * VOCAB),
    })),
  }
}

function retyped(tensor: TinyTensor, type: GgmlType | undefined): TinyTensor {
  if (type === undefined) return tensor
  const elements = tensor.shape.reduce((product, size) => product * size, 1)
  const { blockSize, blockBytes } = GGML_TYPES[type]
  return { ...tensor, type, data: new Uint8Array((elements / blockSize) * blockBytes) }
}

/** Runs the tokens in chunks that end where logits are known; the largest relative error. */
export function typedError(
  model: TypedModel,
  variant?: string,
): { error: number; layouts: string } {
  const backend = new CpuBackend(openModel(model.path), {
    contextLength: 64,
    maxSequences: 2,
    stepTokens: 40,
    cpus: [0],
    pin: false,
    ...(variant === undefined ? {} : { variant }),
  })
  const batch = new StepBatch(40, 2)
  let done = 0
  const errors = model.expected.map(({ position, row }) => {
    batch.clear()
    batch.add(1, done, model.tokens, done, position + 1 - done, true)
    done = position + 1
    backend.launch(batch)
    return relativeError(backend.collect()[0]!, row)
  })
  const layouts = [...backend.weights.repackedBytes.keys()].join()
  backend.close()
  return { error: Math.max(...errors), layouts }
}

function relativeError(row: Float32Array, expected: Float16Array): number {
  let [difference, size] = [0, 0]
  expected.forEach((value, i) => {
    difference += (row[i]! - value) ** 2
    size += value ** 2
  })
  return Math.sqrt(difference / size)
}
