// Owns the GGUF file format: reads a file's header (metadata and tensor infos, never weights)
// and trusts nothing in it. Source: GGUF's specification, ggml's docs/gguf.md, versions 2 and 3.

import { GGUF_MAX_DIMENSIONS, GGUF_MAX_METADATA, GGUF_MAX_TENSORS } from '../limits.ts'
import { GGUF_MAX_HEADER_BYTES, GGUF_MAX_KEY_BYTES, GGUF_MAX_NAME_BYTES } from '../limits.ts'
import { type ByteSource, withFile } from './byte-source.ts'
import { GGML_TYPES, type GgmlType, ggmlTypeById } from './ggml-types.ts'
import { GgufCursor, invalid } from './gguf-cursor.ts'
import { readMetadataValue } from './gguf-values.ts'
import type { MetadataValue } from './model.ts'

/** One tensor of a GGUF file; `offset` counts from the file's first byte. */
export interface GgufTensor {
  name: string
  type: GgmlType
  /** In ggml order: shape[0] is contiguous. */
  shape: readonly number[]
  offset: number
  byteLength: number
}

/** A checked GGUF header: every tensor lies inside the file, none overlaps another. */
export interface Gguf {
  version: number
  metadata: ReadonlyMap<string, MetadataValue>
  tensors: readonly GgufTensor[]
  /** Tensor offsets are multiples of this, counted from `dataOffset`. */
  alignment: number
  dataOffset: number
  byteLength: number
}

const MAGIC = 0x46554747
const DEFAULT_ALIGNMENT = 32
const ALIGNMENTS: ReadonlySet<number> = new Set(Array.from({ length: 32 }, (_, i) => 2 ** i))
const U32 = 4
/** Key length, one byte of key, type and one byte of value. */
const MIN_METADATA_BYTES = 8 + 1 + 4 + 1
/** Name length, one byte of name, dimension count, one dimension, type and offset. */
const MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8

/**
 * Reads the header of a GGUF file.
 * @throws LatticeError `gguf_invalid` with details {field, offset}, or `model_not_found`.
 */
export function readGguf(path: string): Gguf {
  return withFile(path, parseGguf)
}

/** Reads a header from any source; see `readGguf`. */
export function parseGguf(source: ByteSource): Gguf {
  const cursor = new GgufCursor(source)
  const version = readVersion(cursor)
  const tensorCount = readCount(cursor, 'tensor_count', GGUF_MAX_TENSORS, MIN_TENSOR_BYTES)
  const metadataCount = readCount(cursor, 'metadata_count', GGUF_MAX_METADATA, MIN_METADATA_BYTES)
  const metadata = readMetadata(cursor, metadataCount)
  const alignment = alignmentOf(metadata.values, metadata.offsets, source)
  const infos = readTensorInfos(cursor, tensorCount)
  const headerBytes = cursor.offset
  const dataOffset = Math.ceil(headerBytes / alignment) * alignment
  const tensors = infos.map((info) => place(info, dataOffset, alignment, source))
  refuseOverlaps(tensors, infos, source)
  return {
    version,
    metadata: metadata.values,
    tensors,
    alignment,
    dataOffset,
    byteLength: source.byteLength,
  }
}

function readVersion(cursor: GgufCursor): number {
  const magic = cursor.u32('magic')
  if (magic !== MAGIC) {
    const hex = magic.toString(16).padStart(8, '0')
    throw invalid(cursor.source, 'magic', 0, `is 0x${hex}, not "GGUF": this is no GGUF file`)
  }
  const version = cursor.u32('version')
  if (version === 2 || version === 3) return version
  if (version === 1) throw invalid(cursor.source, 'version', U32, 'is 1, and 2 and 3 can be read')
  if ((version & 0xffff) === 0 && version !== 0) {
    const what = `is 0x${version.toString(16)}: big-endian, and only little-endian is read`
    throw invalid(cursor.source, 'version', U32, what)
  }
  throw invalid(cursor.source, 'version', U32, `is ${version}, and 2 and 3 can be read`)
}

function readCount(cursor: GgufCursor, field: string, max: number, minBytes: number): number {
  const offset = cursor.offset
  const count = cursor.u64(field)
  if (count > BigInt(max)) {
    throw invalid(cursor.source, field, offset, `is ${count}, more than the ${max} that may be`)
  }
  const room = Math.floor(cursor.remaining / minBytes)
  if (count > BigInt(room)) {
    const what = `is ${count}, but the rest of the file has room for ${room} at most`
    throw invalid(cursor.source, field, offset, what)
  }
  return Number(count)
}

interface Metadata {
  values: Map<string, MetadataValue>
  /** Where each value's type is, for errors found later. */
  offsets: Map<string, number>
}

function readMetadata(cursor: GgufCursor, count: number): Metadata {
  const values = new Map<string, MetadataValue>()
  const offsets = new Map<string, number>()
  for (let index = 0; index < count; index++) {
    const keyField = `metadata[${index}].key`
    const keyOffset = cursor.offset
    const key = cursor.string(keyField, GGUF_MAX_KEY_BYTES)
    if (key === '') throw invalid(cursor.source, keyField, keyOffset, 'is empty')
    if (values.has(key)) {
      throw invalid(cursor.source, keyField, keyOffset, `repeats the key ${JSON.stringify(key)}`)
    }
    offsets.set(key, cursor.offset)
    values.set(key, readMetadataValue(cursor, key))
    refuseLongHeader(cursor, key)
  }
  return { values, offsets }
}

function refuseLongHeader(cursor: GgufCursor, field: string): void {
  if (cursor.offset <= GGUF_MAX_HEADER_BYTES) return
  const what = `ends past the ${GGUF_MAX_HEADER_BYTES} bytes that a header may have`
  throw invalid(cursor.source, field, cursor.offset, what)
}

function alignmentOf(
  values: ReadonlyMap<string, MetadataValue>,
  offsets: ReadonlyMap<string, number>,
  source: ByteSource,
): number {
  const field = 'general.alignment'
  const value = values.get(field)
  if (value === undefined) return DEFAULT_ALIGNMENT
  const power = typeof value === 'number' && ALIGNMENTS.has(value)
  if (power) return value
  const shown = typeof value === 'number' ? String(value) : `a ${typeof value}`
  throw invalid(source, field, offsets.get(field) ?? 0, `is ${shown}, not a power of two`)
}

/** A tensor info as written, with the offsets of its fields for errors found later. */
interface TensorInfo {
  name: string
  type: GgmlType
  shape: number[]
  byteLength: number
  /** Counted from the start of the data section. */
  dataOffset: bigint
  fieldOffset: number
}

function readTensorInfos(cursor: GgufCursor, count: number): TensorInfo[] {
  const infos: TensorInfo[] = []
  const names = new Set<string>()
  for (let index = 0; index < count; index++) {
    const nameField = `tensors[${index}].name`
    const nameOffset = cursor.offset
    const name = cursor.string(nameField, GGUF_MAX_NAME_BYTES)
    if (name === '') throw invalid(cursor.source, nameField, nameOffset, 'is empty')
    if (names.has(name)) {
      throw invalid(
        cursor.source,
        nameField,
        nameOffset,
        `repeats the name ${JSON.stringify(name)}`,
      )
    }
    names.add(name)
    infos.push(readTensorInfo(cursor, name))
    refuseLongHeader(cursor, name)
  }
  return infos
}

function readTensorInfo(cursor: GgufCursor, name: string): TensorInfo {
  const shape = readShape(cursor, name)
  const typeOffset = cursor.offset
  const id = cursor.u32(`${name}.type`)
  const type = ggmlTypeById(id)
  if (type === undefined) {
    const what = `is ${id}, a tensor type that ggml does not have (or no longer has)`
    throw invalid(cursor.source, `${name}.type`, typeOffset, what)
  }
  const byteLength = tensorBytes(type, shape)
  if (byteLength === undefined) {
    const { blockSize } = GGML_TYPES[type]
    const what = `is ${type}, whose blocks of ${blockSize} do not divide rows of ${shape[0]}`
    throw invalid(cursor.source, `${name}.type`, typeOffset, what)
  }
  const fieldOffset = cursor.offset
  return { name, type, shape, byteLength, dataOffset: cursor.u64(`${name}.offset`), fieldOffset }
}

function readShape(cursor: GgufCursor, name: string): number[] {
  const countOffset = cursor.offset
  const count = cursor.u32(`${name}.dimensions`)
  if (count < 1 || count > GGUF_MAX_DIMENSIONS) {
    const what = `are ${count}, and 1 to ${GGUF_MAX_DIMENSIONS} can be`
    throw invalid(cursor.source, `${name}.dimensions`, countOffset, what)
  }
  const shape: number[] = []
  let elements = 1
  for (let axis = 0; axis < count; axis++) {
    const field = `${name}.dimensions[${axis}]`
    const offset = cursor.offset
    const size = cursor.u64(field)
    if (size === 0n) throw invalid(cursor.source, field, offset, 'is 0')
    // Bytes, not only elements, must stay exact: no type has more than 8 bytes an element.
    elements *= Number(size)
    if (elements * 8 > Number.MAX_SAFE_INTEGER) {
      throw invalid(cursor.source, field, offset, `is ${size}, which makes the tensor too large`)
    }
    shape.push(Number(size))
  }
  return shape
}

/** Bytes of a tensor, or undefined when its rows are not whole blocks. */
export function tensorBytes(type: GgmlType, shape: readonly number[]): number | undefined {
  const { blockSize, blockBytes } = GGML_TYPES[type]
  if ((shape[0] ?? 0) % blockSize !== 0) return undefined
  return shape.reduce((product, size) => product * size, blockBytes) / blockSize
}

function place(
  info: TensorInfo,
  dataOffset: number,
  alignment: number,
  source: ByteSource,
): GgufTensor {
  const { name, type, shape, byteLength } = info
  const field = `${name}.offset`
  if (info.dataOffset % BigInt(alignment) !== 0n) {
    const what = `is ${info.dataOffset}, not a multiple of the alignment ${alignment}`
    throw invalid(source, field, info.fieldOffset, what)
  }
  const end = info.dataOffset + BigInt(dataOffset) + BigInt(byteLength)
  if (end > BigInt(source.byteLength)) {
    const what =
      `puts the tensor's end at byte ${end}, but the file has ${source.byteLength} bytes: ` +
      'it is truncated or damaged'
    throw invalid(source, field, info.fieldOffset, what)
  }
  return { name, type, shape, offset: Number(info.dataOffset) + dataOffset, byteLength }
}

function refuseOverlaps(
  tensors: readonly GgufTensor[],
  infos: readonly TensorInfo[],
  source: ByteSource,
): void {
  const order = tensors.map((tensor, index) => ({ tensor, at: infos[index]?.fieldOffset ?? 0 }))
  order.sort((a, b) => a.tensor.offset - b.tensor.offset || a.at - b.at)
  order.forEach(({ tensor, at }, index) => {
    const before = order[index - 1]?.tensor
    if (before === undefined || before.offset + before.byteLength <= tensor.offset) return
    const what = `is inside the bytes of ${before.name}`
    throw invalid(source, `${tensor.name}.offset`, at, what)
  })
}
