// Owns the writing of small GGUF files for tests: any metadata, any tensors, and a whole tiny
// Llama whose weights are drawn from a seed.

import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { temporaryDirectory } from './temporary.ts'
import { GGML_TYPES, type GgmlType } from '../../src/model/ggml-types.ts'
import { GGUF_VALUE } from '../../src/model/gguf-values.ts'
import type { MetadataValue } from '../../src/model/model.ts'

type ValueType = keyof typeof GGUF_VALUE

/** A value whose type is not the one that its JavaScript type suggests. */
export interface Typed {
  type: ValueType
  value: number | bigint
}

/** Integers are written as u32 (or i32 if negative), other numbers as f32, bigints as u64. */
export type TinyValue = MetadataValue | Typed

export interface TinyTensor {
  name: string
  /** In ggml order: shape[0] is contiguous. */
  shape: readonly number[]
  /** Float32 data is written as F32, or converted to F16 where `type` says so; bytes go as is. */
  data: Float32Array | Uint8Array
  type?: GgmlType
}

export interface TinyGguf {
  version?: number
  metadata: Readonly<Record<string, TinyValue>>
  tensors: readonly TinyTensor[]
}

/** Writes a GGUF file into a fresh temporary directory and returns its path. */
export function writeTinyGguf(contents: TinyGguf, name = 'tiny.gguf'): string {
  const path = join(temporaryDirectory('gguf'), name)
  writeFileSync(path, encodeGguf(contents))
  return path
}

/** The bytes of a GGUF file. */
export function encodeGguf({ version = 3, metadata, tensors }: TinyGguf): Buffer {
  const alignment = Number(metadata['general.alignment'] ?? 32)
  const payloads = tensors.map(payload)
  const pieces: Buffer[] = [u32(0x46554747), u32(version), u64(tensors.length)]
  pieces.push(u64(Object.keys(metadata).length))
  for (const [key, value] of Object.entries(metadata)) pieces.push(text(key), ...typedValue(value))
  let offset = 0
  tensors.forEach((tensor, index) => {
    pieces.push(text(tensor.name), u32(tensor.shape.length), ...tensor.shape.map(u64))
    pieces.push(u32(GGML_TYPES[typeOf(tensor)].id), u64(offset))
    offset = roundUp(offset + (payloads[index]?.byteLength ?? 0), alignment)
  })
  pieces.push(padding(pieces, alignment))
  for (const data of payloads) pieces.push(data, padding([data], alignment))
  return Buffer.concat(pieces)
}

function typeOf({ type, data }: TinyTensor): GgmlType {
  return type ?? (data instanceof Float32Array ? 'F32' : 'I8')
}

function payload(tensor: TinyTensor): Buffer {
  const { data } = tensor
  const half = typeOf(tensor) === 'F16' && data instanceof Float32Array
  const view = half ? new Float16Array(data) : data
  return Buffer.from(view.buffer, view.byteOffset, view.byteLength)
}

function roundUp(size: number, alignment: number): number {
  return Math.ceil(size / alignment) * alignment
}

function padding(pieces: readonly Buffer[], alignment: number): Buffer {
  const size = pieces.reduce((sum, piece) => sum + piece.byteLength, 0)
  return Buffer.alloc(roundUp(size, alignment) - size)
}

function u32(value: number): Buffer {
  const bytes = Buffer.alloc(4)
  bytes.writeUInt32LE(value)
  return bytes
}

function u64(value: number | bigint): Buffer {
  const bytes = Buffer.alloc(8)
  bytes.writeBigUInt64LE(BigInt(value))
  return bytes
}

function text(value: string): Buffer {
  const bytes = Buffer.from(value)
  return Buffer.concat([u64(bytes.byteLength), bytes])
}

const SCALARS: Readonly<Record<string, (value: number & bigint) => ArrayBufferView>> = {
  u8: (value) => Uint8Array.of(value),
  i8: (value) => Int8Array.of(value),
  u16: (value) => Uint16Array.of(value),
  i16: (value) => Int16Array.of(value),
  u32: (value) => Uint32Array.of(value),
  i32: (value) => Int32Array.of(value),
  f32: (value) => Float32Array.of(value),
  f64: (value) => Float64Array.of(value),
  u64: (value) => BigUint64Array.of(BigInt(value)),
  i64: (value) => BigInt64Array.of(BigInt(value)),
}

const ARRAY_TYPES: readonly (readonly [new () => ArrayBufferView, ValueType])[] = [
  [Uint8Array, 'u8'],
  [Int8Array, 'i8'],
  [Uint16Array, 'u16'],
  [Int16Array, 'i16'],
  [Uint32Array, 'u32'],
  [Int32Array, 'i32'],
  [Float32Array, 'f32'],
  [Float64Array, 'f64'],
  [BigUint64Array, 'u64'],
  [BigInt64Array, 'i64'],
]

function bytesOf(view: ArrayBufferView): Buffer {
  return Buffer.from(view.buffer, view.byteOffset, view.byteLength)
}

/** The type's id and the value's bytes. */
function typedValue(value: TinyValue): Buffer[] {
  if (isTyped(value)) {
    const scalar = SCALARS[value.type]?.(value.value as number & bigint) ?? new Uint8Array()
    return [u32(GGUF_VALUE[value.type]), bytesOf(scalar)]
  }
  if (typeof value === 'string') return [u32(GGUF_VALUE.string), text(value)]
  if (typeof value === 'boolean') return [u32(GGUF_VALUE.bool), Buffer.of(value ? 1 : 0)]
  if (typeof value === 'bigint') return typedValue({ type: 'u64', value })
  if (typeof value === 'number') return typedValue({ type: scalarType(value), value })
  return [u32(GGUF_VALUE.array), ...arrayValue(value)]
}

function isTyped(value: TinyValue): value is Typed {
  return typeof value === 'object' && 'type' in value
}

function scalarType(value: number): ValueType {
  if (!Number.isInteger(value)) return 'f32'
  return value < 0 ? 'i32' : 'u32'
}

function arrayValue(value: Exclude<MetadataValue, number | bigint | boolean | string>): Buffer[] {
  if (ArrayBuffer.isView(value)) {
    const type = ARRAY_TYPES.find(([Type]) => value instanceof Type)?.[1] ?? 'u8'
    return [u32(GGUF_VALUE[type]), u64(value.length), bytesOf(value)]
  }
  const items = (value as readonly MetadataValue[]).map(typedValue)
  const type = items[0]?.[0] ?? u32(GGUF_VALUE.u8)
  return [type, u64(items.length), ...items.flatMap((item) => item.slice(1))]
}

/** Sizes of the Llama that `tinyLlama` makes. */
export const TINY_LLAMA = {
  layers: 2,
  hidden: 64,
  heads: 4,
  kvHeads: 2,
  feedForward: 96,
  vocab: 320,
  contextLength: 512,
}

/**
 * A whole Llama with random weights and a byte-level vocabulary: small, valid, and useless as a
 * language model. The same seed gives the same file.
 *
 * @param metadata added to the usual keys, or in their place
 */
export function tinyLlama(seed = 1, metadata: Readonly<Record<string, TinyValue>> = {}): TinyGguf {
  const { layers, hidden, heads, kvHeads, feedForward, vocab } = TINY_LLAMA
  const random = xorshift(seed)
  const matrix = (name: string, ...shape: [number, number]): TinyTensor => ({
    name,
    shape,
    data: Float32Array.from({ length: shape[0] * shape[1] }, () => random() / Math.sqrt(shape[0])),
  })
  const norm = (name: string): TinyTensor => ({
    name,
    shape: [hidden],
    data: Float32Array.from({ length: hidden }, () => 1 + random() / 8),
  })
  const keys = (hidden / heads) * kvHeads
  const tensors = [matrix('token_embd.weight', hidden, vocab), norm('output_norm.weight')]
  for (let layer = 0; layer < layers; layer++) {
    const at = (part: string) => `blk.${layer}.${part}.weight`
    tensors.push(norm(at('attn_norm')), norm(at('ffn_norm')))
    tensors.push(matrix(at('attn_q'), hidden, hidden), matrix(at('attn_k'), hidden, keys))
    tensors.push(matrix(at('attn_v'), hidden, keys), matrix(at('attn_output'), hidden, hidden))
    tensors.push(matrix(at('ffn_gate'), hidden, feedForward))
    tensors.push(matrix(at('ffn_up'), hidden, feedForward))
    tensors.push(matrix(at('ffn_down'), feedForward, hidden))
  }
  return { metadata: { ...tinyLlamaMetadata(), ...metadata }, tensors }
}

/** The same with its matrices in Q8_0: computed alone or beside others, their bits are the same. */
export function quantized({ tensors, ...rest }: TinyGguf): TinyGguf {
  return { ...rest, tensors: tensors.map((tensor) => (tensor.shape[1] ? q8(tensor) : tensor)) }
}

/** Blocks of 32 values: a scale as float16, then a signed byte each (block_q8_0 in ggml). */
function q8({ data, ...rest }: TinyTensor): TinyTensor {
  const blocks: Buffer[] = []
  const numbers = Array.from(data)
  for (let at = 0; at < numbers.length; at += 32) {
    const values = numbers.slice(at, at + 32)
    const [scale = 0] = Float16Array.of(Math.max(...values.map(Math.abs)) / 127)
    const bytes = Int8Array.from(values, (value) => Math.round(value / scale))
    blocks.push(bytesOf(Float16Array.of(scale)), bytesOf(bytes))
  }
  return { ...rest, data: Buffer.concat(blocks), type: 'Q8_0' }
}

function tinyLlamaMetadata(): Record<string, TinyValue> {
  const { layers, hidden, heads, kvHeads, feedForward, vocab, contextLength } = TINY_LLAMA
  const tokens = byteTokens(vocab)
  return {
    'general.architecture': 'llama',
    'general.name': 'Tiny Llama',
    'llama.block_count': layers,
    'llama.context_length': contextLength,
    'llama.embedding_length': hidden,
    'llama.feed_forward_length': feedForward,
    'llama.attention.head_count': heads,
    'llama.attention.head_count_kv': kvHeads,
    'llama.attention.layer_norm_rms_epsilon': { type: 'f32', value: 1e-5 },
    'llama.rope.freq_base': { type: 'f32', value: 10_000 },
    'llama.rope.dimension_count': hidden / heads,
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'smollm',
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.token_type': Int32Array.from(tokens, (token) =>
      token.startsWith('<|') ? 3 : 1,
    ),
    'tokenizer.ggml.merges': ['t h', 'i n'],
    'tokenizer.ggml.bos_token_id': 0,
    'tokenizer.ggml.eos_token_id': 1,
    'tokenizer.ggml.add_bos_token': false,
  }
}

/** Two special tokens, the 256 byte characters of GPT-2's alphabet, two merges and fillers. */
function byteTokens(vocab: number): string[] {
  const printable = (byte: number) =>
    (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174
  let extra = 256
  const bytes = Array.from({ length: 256 }, (_, byte) =>
    String.fromCodePoint(printable(byte) ? byte : extra++),
  )
  const known = ['<|start|>', '<|end|>', ...bytes, 'th', 'in']
  const fillers = Array.from({ length: vocab - known.length }, (_, i) => `<|filler_${i}|>`)
  return [...known, ...fillers]
}

/** Uniform in (-1, 1), from Marsaglia's 32-bit xorshift. */
export function xorshift(seed: number): () => number {
  let state = seed | 0 || 1
  return () => {
    state ^= state << 13
    state ^= state >>> 17
    state ^= state << 5
    return state / 2 ** 31
  }
}
