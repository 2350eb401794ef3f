// Owns the values of GGUF metadata: thirteen types, arrays of them and arrays of arrays.

import { GGUF_MAX_ARRAY_DEPTH, GGUF_MAX_ARRAY_LENGTH, GGUF_MAX_STRING_BYTES } from '../limits.ts'
import { type GgufCursor, invalid } from './gguf-cursor.ts'
import type { MetadataValue } from './model.ts'

/** Ids of value types as the specification numbers them. */
export const GGUF_VALUE = {
  u8: 0,
  i8: 1,
  u16: 2,
  i16: 3,
  u32: 4,
  i32: 5,
  f32: 6,
  bool: 7,
  string: 8,
  array: 9,
  u64: 10,
  i64: 11,
  f64: 12,
} as const

type Numbers =
  | Uint8Array
  | Int8Array
  | Uint16Array
  | Int16Array
  | Uint32Array
  | Int32Array
  | Float32Array
  | Float64Array
  | BigUint64Array
  | BigInt64Array

type NumbersConstructor = {
  readonly BYTES_PER_ELEMENT: number
  new (buffer: ArrayBuffer): Numbers
}

const NUMBERS: ReadonlyMap<number, NumbersConstructor> = new Map<number, NumbersConstructor>([
  [GGUF_VALUE.u8, Uint8Array],
  [GGUF_VALUE.i8, Int8Array],
  [GGUF_VALUE.u16, Uint16Array],
  [GGUF_VALUE.i16, Int16Array],
  [GGUF_VALUE.u32, Uint32Array],
  [GGUF_VALUE.i32, Int32Array],
  [GGUF_VALUE.f32, Float32Array],
  [GGUF_VALUE.u64, BigUint64Array],
  [GGUF_VALUE.i64, BigInt64Array],
  [GGUF_VALUE.f64, Float64Array],
])

/** Reads the type and the value of one key. 64-bit integers become numbers where that is exact. */
export function readMetadataValue(cursor: GgufCursor, key: string): MetadataValue {
  const offset = cursor.offset
  const type = cursor.u32(`${key}.type`)
  if (type === GGUF_VALUE.array) return readArray(cursor, key, 1)
  if (type === GGUF_VALUE.string) return cursor.string(key, GGUF_MAX_STRING_BYTES)
  if (type === GGUF_VALUE.bool) return readBool(cursor, key)
  return readScalar(cursor, key, type, offset)
}

function readScalar(
  cursor: GgufCursor,
  key: string,
  type: number,
  typeOffset: number,
): number | bigint {
  const Type = numbersOf(cursor, key, type, typeOffset)
  const [value = 0] = new Type(cursor.copy(Type.BYTES_PER_ELEMENT, key).buffer)
  if (typeof value === 'number') return value
  const number = Number(value)
  return Number.isSafeInteger(number) ? number : value
}

function numbersOf(
  cursor: GgufCursor,
  key: string,
  type: number,
  offset: number,
): NumbersConstructor {
  const Type = NUMBERS.get(type)
  if (Type !== undefined) return Type
  throw invalid(cursor.source, `${key}.type`, offset, `is ${type}, a value type that GGUF lacks`)
}

function readBool(cursor: GgufCursor, key: string): boolean {
  const offset = cursor.offset
  const byte = cursor.u8(key)
  if (byte > 1) throw invalid(cursor.source, key, offset, `is ${byte}, and a bool is 0 or 1`)
  return byte === 1
}

function readArray(cursor: GgufCursor, key: string, depth: number): MetadataValue {
  const typeOffset = cursor.offset
  const type = cursor.u32(`${key}.type`)
  const lengthOffset = cursor.offset
  const length = cursor.u64(`${key}.length`)
  if (length > BigInt(GGUF_MAX_ARRAY_LENGTH)) {
    const what = `is ${length}, more than the ${GGUF_MAX_ARRAY_LENGTH} elements that may be`
    throw invalid(cursor.source, `${key}.length`, lengthOffset, what)
  }
  const count = Number(length)
  const need = count * elementBytes(cursor, key, type, typeOffset)
  if (need > cursor.remaining) {
    const what = `is ${count}, which takes ${need} bytes, but only ${cursor.remaining} follow`
    throw invalid(cursor.source, `${key}.length`, lengthOffset, what)
  }
  if (type === GGUF_VALUE.array && depth === GGUF_MAX_ARRAY_DEPTH) {
    const what = `nests arrays more than ${GGUF_MAX_ARRAY_DEPTH} deep`
    throw invalid(cursor.source, `${key}.type`, typeOffset, what)
  }
  switch (type) {
    case GGUF_VALUE.array:
      return repeat(count, (i) => readArray(cursor, `${key}[${i}]`, depth + 1))
    case GGUF_VALUE.string:
      return repeat(count, (i) => readElement(cursor, key, i))
    case GGUF_VALUE.bool:
      return repeat(count, (i) => readBool(cursor, `${key}[${i}]`))
    default:
      return new (numbersOf(cursor, key, type, typeOffset))(cursor.copy(need, key).buffer)
  }
}

/** Bytes that an element takes at least. */
function elementBytes(cursor: GgufCursor, key: string, type: number, offset: number): number {
  if (type === GGUF_VALUE.array) return 4 + 8
  if (type === GGUF_VALUE.string) return 8
  if (type === GGUF_VALUE.bool) return 1
  return numbersOf(cursor, key, type, offset).BYTES_PER_ELEMENT
}

function readElement(cursor: GgufCursor, key: string, index: number): string {
  return cursor.string(`${key}[${index}]`, GGUF_MAX_STRING_BYTES)
}

function repeat<T>(count: number, read: (index: number) => T): T[] {
  const values: T[] = []
  for (let index = 0; index < count; index++) values.push(read(index))
  return values
}
