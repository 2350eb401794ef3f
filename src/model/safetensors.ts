// Owns the safetensors file format: reads a file's header and trusts nothing in it.
// Source: the format section of the safetensors README.

import { LatticeError } from '../errors.ts'
import { SAFETENSORS_MAX_HEADER_BYTES } from '../limits.ts'
import { type ByteSource, withFile } from './byte-source.ts'
import { isObject } from './json.ts'

/** Bytes an element; the float types are those that models are made of. */
const DTYPE_BYTES: Readonly<Record<string, number>> = {
  F64: 8,
  F32: 4,
  F16: 2,
  BF16: 2,
  F8_E4M3: 1,
  F8_E5M2: 1,
  I64: 8,
  I32: 4,
  I16: 2,
  I8: 1,
  U64: 8,
  U32: 4,
  U16: 2,
  U8: 1,
  BOOL: 1,
}

/** One tensor; shape in the file's order: the last dimension is contiguous. */
export interface SafeTensor {
  name: string
  dtype: string
  shape: readonly number[]
  /** Counted from the file's first byte. */
  offset: number
  byteLength: number
}

/** A checked header: tensors fill the data without holes or overlaps, as the format demands. */
export interface Safetensors {
  tensors: readonly SafeTensor[]
  byteLength: number
}

/**
 * Reads the header of a safetensors file.
 * @throws LatticeError `safetensors_invalid` with details {field, offset}, or `model_not_found`
 */
export function readSafetensors(path: string): Safetensors {
  return withFile(path, parseSafetensors)
}

const LENGTH_BYTES = 8

/** Reads a header from any source; see `readSafetensors`. */
export function parseSafetensors(source: ByteSource): Safetensors {
  const text = readHeader(source)
  const header = parseHeader(source, text)
  const dataOffset = LENGTH_BYTES + text.byteLength
  const tensors = Object.entries(header)
    .filter(([name]) => name !== '__metadata__')
    .map(([name, value]) => readTensor(source, text, dataOffset, name, value))
  tensors.sort((a, b) => a.offset - b.offset || a.byteLength - b.byteLength)
  refuseHolesAndOverlaps(source, text, dataOffset, tensors)
  return { tensors, byteLength: source.byteLength }
}

function readHeader(source: ByteSource): Buffer {
  if (source.byteLength < LENGTH_BYTES) {
    throw invalid(source, 'header_length', 0, `needs 8 bytes, the file has ${source.byteLength}`)
  }
  const prefix = Buffer.alloc(LENGTH_BYTES)
  source.read(prefix, 0)
  const length = prefix.readBigUInt64LE()
  const rest = source.byteLength - LENGTH_BYTES
  if (length > BigInt(rest)) {
    throw invalid(source, 'header_length', 0, `is ${length}, but only ${rest} bytes follow`)
  }
  if (length > BigInt(SAFETENSORS_MAX_HEADER_BYTES)) {
    const what = `is ${length}, more than the ${SAFETENSORS_MAX_HEADER_BYTES} bytes that may be`
    throw invalid(source, 'header_length', 0, what)
  }
  const text = Buffer.alloc(Number(length))
  source.read(text, LENGTH_BYTES)
  return text
}

function parseHeader(source: ByteSource, text: Buffer): Record<string, unknown> {
  try {
    const header: unknown = JSON.parse(text.toString('utf8'))
    if (isObject(header)) return header
  } catch (thrown) {
    throw invalid(source, 'header', LENGTH_BYTES, `is no JSON (${(thrown as Error).message})`)
  }
  throw invalid(source, 'header', LENGTH_BYTES, 'is no JSON object')
}

function readTensor(
  source: ByteSource,
  text: Buffer,
  dataOffset: number,
  name: string,
  value: unknown,
): SafeTensor {
  const wrong = (field: string, what: string) =>
    invalid(source, `${name}.${field}`, find(text, name), what)
  if (!isObject(value)) throw invalid(source, name, find(text, name), 'is no object')
  const { dtype, shape, data_offsets: range } = value
  const size = typeof dtype === 'string' && Object.hasOwn(DTYPE_BYTES, dtype) && DTYPE_BYTES[dtype]
  if (typeof dtype !== 'string' || !size) {
    throw wrong('dtype', `is ${show(dtype)}, which is no known type`)
  }
  if (!isCounts(shape)) throw wrong('shape', `is ${show(shape)}, not a list of sizes`)
  if (!isCounts(range) || range.length !== 2) {
    throw wrong('data_offsets', `is ${show(range)}, not two offsets`)
  }
  const [begin = 0, end = 0] = range
  const bytes = shape.reduce((product, dimension) => product * dimension, size)
  if (bytes > Number.MAX_SAFE_INTEGER) throw wrong('shape', `is ${show(shape)}: too large`)
  if (end - begin !== bytes) {
    throw wrong('data_offsets', `span ${end - begin} bytes, but ${dtype} [${shape}] has ${bytes}`)
  }
  if (dataOffset + end > source.byteLength) {
    const what = `end at byte ${dataOffset + end}, but the file has ${source.byteLength} bytes`
    throw wrong('data_offsets', `${what}: it is truncated or damaged`)
  }
  return { name, dtype, shape, offset: dataOffset + begin, byteLength: bytes }
}

function isCounts(value: unknown): value is number[] {
  return Array.isArray(value) && value.every((item) => Number.isSafeInteger(item) && item >= 0)
}

function show(value: unknown): string {
  const text = JSON.stringify(value) ?? 'missing'
  return text.length > 80 ? `${text.slice(0, 80)}…` : text
}

function refuseHolesAndOverlaps(
  source: ByteSource,
  text: Buffer,
  dataOffset: number,
  tensors: readonly SafeTensor[],
): void {
  let end = dataOffset
  for (const { name, offset, byteLength } of tensors) {
    if (offset !== end) {
      const what = offset < end ? 'overlap the tensor before' : `leave ${offset - end} bytes unused`
      throw invalid(source, `${name}.data_offsets`, find(text, name), what)
    }
    end += byteLength
  }
  if (end === source.byteLength) return
  const what = `say that the file has ${end} bytes, but it has ${source.byteLength}`
  throw invalid(source, 'data_offsets', LENGTH_BYTES, what)
}

/** Where a tensor's entry begins in the file. */
function find(text: Buffer, name: string): number {
  return LENGTH_BYTES + Math.max(0, text.indexOf(JSON.stringify(name)))
}

function invalid(source: ByteSource, field: string, offset: number, what: string): LatticeError {
  const where = `${source.name}: ${field} at byte ${offset}`
  return new LatticeError('safetensors_invalid', `${where} ${what}.`, {
    todo: 'Download the file again (`lattice rm`, then `lattice pull`), or take another one.',
    details: { field, offset },
  })
}
