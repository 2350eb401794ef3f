// Owns writing WebAssembly, instruction by instruction: for the few inner loops that want words of
// 64 or 128 bits, which JavaScript's numbers are not. The binary format is the specification's,
// chapter 5.

/** What is used of it; the compiler's own types come with a browser's. */
interface WebAssembly {
  Module: new (bytes: Uint8Array) => object
  Instance: new (module: object) => { exports: unknown }
}

const { Module, Instance } = (globalThis as unknown as { WebAssembly: WebAssembly }).WebAssembly

export type Code = readonly number[]
export const I32 = 0x7f
export const I64 = 0x7e
/** 16 bytes */
export const V128 = 0x7b
const VOID = 0x40

export const get = (local: number): Code => [0x20, local]
export const set = (local: number, value: Code): Code => [...value, 0x21, local]
export const i32 = (value: number): Code => [0x41, ...signed(BigInt(value | 0))]
export const i64 = (value: bigint): Code => [0x42, ...signed(BigInt.asIntN(64, value))]

/** Two operands and what becomes of them. */
const binary =
  (code: number) =>
  (a: Code, b: Code): Code => [...a, ...b, code]
const unary =
  (code: number) =>
  (a: Code): Code => [...a, code]
export const add32 = binary(0x6a)
export const sub32 = binary(0x6b)
export const and32 = binary(0x71)
export const or32 = binary(0x72)
export const xor32 = binary(0x73)
export const shl32 = binary(0x74)
export const shr32 = binary(0x76)
export const equal32 = binary(0x46)
export const differ32 = binary(0x47)
export const less32 = binary(0x49)
export const notLess32 = binary(0x4f)
export const isZero32 = unary(0x45)
export const isZero64 = unary(0x50)
export const differ64 = binary(0x52)
export const add64 = binary(0x7c)
export const sub64 = binary(0x7d)
export const times64 = binary(0x7e)
export const and64 = binary(0x83)
export const or64 = binary(0x84)
export const xor64 = binary(0x85)
export const shl64 = binary(0x86)
export const shr64 = binary(0x88)
export const rotate64 = binary(0x89)
export const zerosBelow64 = unary(0x7a)
export const low32 = unary(0xa7)
export const wide64 = unary(0xad)

/** Unaligned, but for what the hint says. */
export const byteAt = (at: Code, offset = 0): Code => [...at, 0x2d, 0, ...unsigned(offset)]
export const wordAt = (at: Code, offset = 0): Code => [...at, 0x28, 0, ...unsigned(offset)]
export const longAt = (at: Code, offset = 0): Code => [...at, 0x29, 0, ...unsigned(offset)]
/** One of two values, both of which are computed: it costs no branch that may be foretold wrong. */
export const choose = (condition: Code, one: Code, other: Code): Code => [
  ...[...one, ...other, ...condition],
  0x1b,
]

const vector = (code: number, ...operands: Code[]): Code => [...operands.flat(), 0xfd, code]
const vectors =
  (code: number) =>
  (...operands: Code[]): Code =>
    vector(code, ...operands)
export const bytesAt = (at: Code, offset = 0): Code => [
  ...vector(0x00, at),
  ...[0, ...unsigned(offset)],
]
export const putBytes = (at: Code, value: Code, offset = 0): Code => [
  ...vector(0x0b, at, value),
  ...[0, ...unsigned(offset)],
]
/** A byte 16 times. */
export const sameBytesAt = (at: Code, offset = 0): Code => [
  ...vector(0x07, at),
  ...[0, ...unsigned(offset)],
]
/** Byte by byte: 255 where it is so, else 0. */
export const equalBytes = vectors(0x23)
/** As signed numbers: from 128 on they are the smallest. */
export const greaterBytes = vectors(0x27)
export const andBytes = vectors(0x4e)
/** What the second has is cleared in the first. */
export const withoutBytes = vectors(0x4f)
export const orBytes = vectors(0x50)
export const xorBytes = vectors(0x51)
/** 1 if any bit is set. */
export const anyBytes = vectors(0x53)
/** A bit for the highest of each byte. */
export const bitsOfBytes = vectors(0x64)
/** One of its two halves. */
export const halfOf = (value: Code, half: 0 | 1): Code => [...vector(0x1d, value), half]

export const putWord = (at: Code, value: Code, offset = 0): Code => [
  ...[...at, ...value, 0x36, 0],
  ...unsigned(offset),
]
export const putLong = (at: Code, value: Code, offset = 0): Code => [
  ...[...at, ...value, 0x37, 0],
  ...unsigned(offset),
]

/** `leave(0)` goes behind it. */
export const block = (...body: Code[]): Code => [0x02, VOID, ...body.flat(), 0x0b]
/** `leave(0)` goes to its beginning; its end leaves it. */
export const loop = (...body: Code[]): Code => [0x03, VOID, ...body.flat(), 0x0b]
/** Out of so many of what is around, or again if that is a loop. An `when` is around too. */
export const leave = (depth: number): Code => [0x0c, depth]
export const leaveIf = (depth: number, condition: Code): Code => [...condition, 0x0d, depth]
export const when = (condition: Code, then: Code, otherwise?: Code): Code =>
  otherwise === undefined
    ? [...condition, 0x04, VOID, ...then, 0x0b]
    : [...condition, 0x04, VOID, ...then, 0x05, ...otherwise, 0x0b]
/** The value of one of two, by a condition. */
export const when32 = (condition: Code, then: Code, otherwise: Code): Code => [
  ...[...condition, 0x04, I32, ...then],
  ...[0x05, ...otherwise, 0x0b],
]
export const giveBack = (value: Code): Code => [...value, 0x0f]

export interface Routine {
  name: string
  parameters: Code
  results: Code
  /** Types of the other locals; they are numbered behind the parameters. */
  locals: Code
  body: Code
}

/** Compiles a module of one routine and its memory, of so many pages of 64 KiB. */
export function assemble<T>({ name, ...routine }: Routine, pages: number): T {
  const { parameters, results, locals, body } = routine
  const code = [...unsigned(locals.length), ...locals.flatMap((type) => [1, type]), ...body, 0x0b]
  const type = [0x60, ...unsigned(parameters.length), ...parameters, results.length, ...results]
  const module = Uint8Array.from([
    ...[0, 0x61, 0x73, 0x6d, 1, 0, 0, 0],
    ...[1, ...sized([1, ...type])],
    ...[3, ...sized([1, 0])],
    ...[5, ...sized([1, 0, ...unsigned(pages)])],
    ...[7, ...sized([2, ...text('memory'), 2, 0, ...text(name), 0, 0])],
    ...[10, ...sized([1, ...sized(code)])],
  ])
  return new Instance(new Module(module)).exports as T
}

/** A section, or anything else that says first how long it is. */
function sized(bytes: Code): Code {
  return [...unsigned(bytes.length), ...bytes]
}

function text(name: string): Code {
  return sized([...Buffer.from(name)])
}

/** LEB128 */
function unsigned(value: number): Code {
  return value < 128 ? [value] : [(value & 127) | 128, ...unsigned(value >>> 7)]
}

function signed(value: bigint): Code {
  const byte = Number(value & 127n)
  const rest = value >> 7n
  const isLast = (rest === 0n && byte < 64) || (rest === -1n && byte >= 64)
  return isLast ? [byte] : [byte | 128, ...signed(rest)]
}
