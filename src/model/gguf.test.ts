import assert from 'node:assert/strict'
import { test } from 'node:test'
import { encodeGguf, type TinyGguf, xorshift } from '../../test/support/tiny-gguf.ts'
import { LatticeError } from '../errors.ts'
import { memorySource } from './byte-source.ts'
import { parseGguf } from './gguf.ts'

const ONE_TENSOR: TinyGguf = {
  metadata: { 'general.architecture': 'llama' },
  tensors: [{ name: 'a', shape: [8], data: new Float32Array(8) }],
}

function parse(bytes: Uint8Array) {
  return parseGguf(memorySource('test.gguf', bytes))
}

/** The error of a file that must not parse: its field and offset, and a message that names both. */
function refusal(bytes: Uint8Array): { field: unknown; offset: unknown; message: string } {
  try {
    parse(bytes)
  } catch (thrown) {
    assert.ok(thrown instanceof LatticeError, String(thrown))
    assert.equal(thrown.code, 'gguf_invalid')
    const { field, offset } = thrown.details
    assert.ok(thrown.message.includes(`${field} at byte ${offset}`), thrown.message)
    return { field, offset, message: thrown.message }
  }
  throw new Error('it parsed')
}

function assertRefused(bytes: Uint8Array, field: string, offset: number, message: RegExp): void {
  const actual = refusal(bytes)
  assert.deepEqual({ field: actual.field, offset: actual.offset }, { field, offset })
  assert.match(actual.message, message)
}

/** A file with some bytes replaced; `find` is text before them, or an offset. */
function patched(
  base: TinyGguf,
  at: (bytes: Buffer) => number,
  write: (bytes: Buffer, at: number) => void,
) {
  const bytes = encodeGguf(base)
  write(bytes, at(bytes))
  return bytes
}

/** Offset just behind a string in the file. */
const after = (text: string) => (bytes: Buffer) => bytes.indexOf(text) + text.length

test('every value type reads back as what was written', () => {
  const metadata = {
    u8: { type: 'u8', value: 200 },
    i8: { type: 'i8', value: -100 },
    u16: { type: 'u16', value: 60_000 },
    i16: { type: 'i16', value: -30_000 },
    u32: 4_000_000_000,
    i32: -2_000_000_000,
    f32: { type: 'f32', value: 0.5 },
    f64: { type: 'f64', value: 0.1 },
    u64: { type: 'u64', value: 2n ** 63n },
    smallU64: { type: 'u64', value: 12 },
    i64: { type: 'i64', value: -(2n ** 60n) },
    bool: true,
    text: 'tokens: é 漢 🜁 \ufffd',
    empty: '',
    texts: ['a', '', '漢'],
    flags: [true, false],
    bytes: Uint8Array.of(1, 255),
    signed: Int8Array.of(-1),
    shorts: Int16Array.of(-5, 5),
    words: Uint16Array.of(65_535),
    ints: Int32Array.of(-7),
    unsigned: Uint32Array.of(7),
    floats: Float32Array.of(1.5, -2),
    doubles: Float64Array.of(Math.PI),
    longs: BigInt64Array.of(-3n),
    bigs: BigUint64Array.of(3n),
    nested: [['a'], ['b', 'c']],
  } as const
  const { metadata: read } = parse(encodeGguf({ metadata, tensors: [] }))
  for (const [key, value] of Object.entries(metadata)) {
    const plain = typeof value === 'object' && 'type' in value ? value.value : value
    assert.deepEqual(read.get(key), plain, key)
  }
  assert.equal(read.size, Object.keys(metadata).length)
})

test('tensors lie where the file says, in versions 2 and 3 and with another alignment', () => {
  for (const version of [2, 3]) {
    const bytes = encodeGguf({
      version,
      metadata: { 'general.alignment': 64 },
      tensors: [
        { name: 'one', shape: [3, 2], data: Float32Array.of(1, 2, 3, 4, 5, 6) },
        { name: 'two', shape: [2], type: 'F16', data: Float32Array.of(0.5, -4) },
        { name: 'three', shape: [32, 1, 2], type: 'Q8_0', data: new Uint8Array(68).fill(7) },
      ],
    })
    const { tensors, alignment, dataOffset } = parse(bytes)
    assert.deepEqual([alignment, dataOffset % 64], [64, 0])
    const [one, two, three] = tensors
    assert.deepEqual(one?.shape, [3, 2])
    assert.equal(bytes.readFloatLE((one?.offset ?? 0) + 20), 6)
    assert.deepEqual([two?.type, two?.byteLength], ['F16', 4])
    assert.equal(bytes.readUInt16LE(two?.offset ?? 0), 0x3800)
    assert.deepEqual([three?.byteLength, bytes[three?.offset ?? 0]], [68, 7])
  }
})

test('a header longer than one read is read whole', () => {
  const tokens = Array.from({ length: 40_000 }, (_, i) => `token ${i}`)
  const { metadata } = parse(encodeGguf({ metadata: { tokens, last: 1 }, tensors: [] }))
  assert.deepEqual(metadata.get('tokens'), tokens)
  assert.equal(metadata.get('last'), 1)
})

test('a file that ends anywhere in its header or its data is refused', () => {
  const whole = encodeGguf({
    metadata: { text: 'abc', list: Int32Array.of(1, 2), names: ['x', 'y'] },
    tensors: [{ name: 'a', shape: [8], data: new Float32Array(8) }],
  })
  for (let length = 0; length < whole.byteLength; length++) {
    const { offset } = refusal(whole.subarray(0, length))
    assert.ok(Number(offset) <= length, `cut at ${length}, error at ${offset}`)
  }
  parse(whole)
})

test('magic, version 1, unknown versions and big-endian files are named', () => {
  const write = (offset: number, value: number) =>
    patched(
      ONE_TENSOR,
      () => offset,
      (bytes, at) => void bytes.writeUInt32LE(value, at),
    )
  assertRefused(write(0, 0x67676d6c), 'magic', 0, /not "GGUF"/)
  assertRefused(write(4, 1), 'version', 4, /is 1/)
  assertRefused(write(4, 0), 'version', 4, /is 0/)
  assertRefused(write(4, 4), 'version', 4, /is 4/)
  assertRefused(write(4, 0x03000000), 'version', 4, /big-endian/)
})

test('counts that the file has no room for are refused before anything is reserved', () => {
  const count = (offset: number, value: bigint) =>
    patched(
      ONE_TENSOR,
      () => offset,
      (bytes, at) => void bytes.writeBigUInt64LE(value, at),
    )
  assertRefused(count(8, 2n ** 60n), 'tensor_count', 8, /1152921504606846976/)
  assertRefused(count(8, 2n ** 64n - 1n), 'tensor_count', 8, /more than the/)
  assertRefused(count(8, 1000n), 'tensor_count', 8, /room for/)
  assertRefused(count(16, 2n ** 60n), 'metadata_count', 16, /more than the/)
  assertRefused(count(16, 999n), 'metadata_count', 16, /room for/)
})

test('lengths of strings and arrays past the end, and beyond any sense, are refused', () => {
  const base: TinyGguf = {
    metadata: { k: 'value', list: Int32Array.of(1), names: ['x'] },
    tensors: [],
  }
  const at = (text: string, skip: number, value: bigint) =>
    patched(
      base,
      (bytes) => after(text)(bytes) + skip,
      (bytes, offset) => void bytes.writeBigUInt64LE(value, offset),
    )
  const bytes = encodeGguf(base)
  const end = (text: string) => after(text)(bytes)
  assertRefused(at('k', 4, 2n ** 60n), 'k', end('k') + 4, /length of 1152921504606846976/)
  assertRefused(at('k', 4, 500n), 'k', end('k') + 4, /only \d+ bytes follow/)
  assertRefused(at('list', 8, 2n ** 62n), 'list.length', end('list') + 8, /more than the 4194304/)
  assertRefused(at('list', 8, 1_000_000n), 'list.length', end('list') + 8, /takes 4000000 bytes/)
  assertRefused(at('names', 8, 40n), 'names.length', end('names') + 8, /takes 320 bytes/)
  assertRefused(at('names', 16, 2n ** 40n), 'names[0]', end('names') + 16, /has a length/)
})

test('unknown value types, bools that are neither and arrays nested too deep are refused', () => {
  const base: TinyGguf = { metadata: { k: true, list: [true] }, tensors: [] }
  const bytes = encodeGguf(base)
  const k = bytes.indexOf('k') + 1
  const list = bytes.indexOf('list') + 4
  const write = (offset: number, value: number) =>
    patched(
      base,
      () => offset,
      (buffer, at) => void buffer.writeUInt8(value, at),
    )
  assertRefused(write(k, 13), 'k.type', k, /is 13, a value type that GGUF lacks/)
  assertRefused(write(k + 4, 2), 'k', k + 4, /a bool is 0 or 1/)
  assertRefused(write(list + 4, 99), 'list.type', list + 4, /is 99/)
  assertRefused(write(list + 16, 7), 'list[0]', list + 16, /a bool is 0 or 1/)
  const deep = [[[[[1]]]]].map((inner) => inner)
  const { field, message } = refusal(
    encodeGguf({ metadata: { deep: [deep] as never }, tensors: [] }),
  )
  assert.match(String(field), /^deep/)
  assert.match(message, /nests arrays more than 4 deep/)
})

test('keys and names that are empty, repeated, too long or not UTF-8 are refused', () => {
  const twice = encodeGguf({ metadata: { aa: 1, ab: 1 }, tensors: [] })
  twice[twice.indexOf('ab') + 1] = 0x61
  assertRefused(twice, 'metadata[1].key', twice.lastIndexOf('aa') - 8, /repeats the key "aa"/)
  assertRefused(
    encodeGguf({ metadata: { '': 1, filler: 'filler' }, tensors: [] }),
    'metadata[0].key',
    24,
    /is empty/,
  )
  const bad = encodeGguf({ metadata: { key: 'a' }, tensors: [] })
  bad[bad.indexOf('key')] = 0xff
  assertRefused(bad, 'metadata[0].key', 24, /not UTF-8/)
  const data = new Float32Array(8)
  const names = (first: string, second: string) =>
    encodeGguf({
      metadata: {},
      tensors: [first, second].map((name) => ({ name, shape: [8], data })),
    })
  assert.match(
    refusal(names('t', 't')).message,
    /tensors\[1\].name at byte \d+ repeats the name "t"/,
  )
  assert.match(refusal(names('t', '')).message, /tensors\[1\].name at byte \d+ is empty/)
  assert.match(refusal(names('t', 'x'.repeat(65))).message, /more than the 64 bytes/)
})

test('alignments that are no power of two are refused', () => {
  for (const value of [0, 3, 48, 2 ** 32 - 1]) {
    const bytes = encodeGguf({ ...ONE_TENSOR, metadata: { 'general.alignment': 32 } })
    const at = after('general.alignment')(bytes)
    bytes.writeUInt32LE(value, at + 4)
    assertRefused(bytes, 'general.alignment', at, /not a power of two/)
  }
  const text = encodeGguf({ metadata: { 'general.alignment': '32' }, tensors: [] })
  assertRefused(text, 'general.alignment', after('general.alignment')(text), /a string/)
})

test('shapes, types and rows that no tensor can have are refused', () => {
  const bytes = encodeGguf(ONE_TENSOR)
  // The info: name length, "a", dimension count, dimension, type, offset.
  const dimensions = bytes.indexOf(Buffer.from('\x01\0\0\0\0\0\0\0a\x01\0\0\0')) + 9
  const size = dimensions + 4
  const type = size + 8
  const offset = type + 4
  const write = (at: number, value: bigint) =>
    patched(
      ONE_TENSOR,
      () => at,
      (buffer) => void buffer.writeBigUInt64LE(value, at),
    )
  const write32 = (at: number, value: number) =>
    patched(
      ONE_TENSOR,
      () => at,
      (buffer) => void buffer.writeUInt32LE(value, at),
    )
  assertRefused(write32(dimensions, 0), 'a.dimensions', dimensions, /are 0/)
  assertRefused(write32(dimensions, 5), 'a.dimensions', dimensions, /are 5, and 1 to 4/)
  assertRefused(write(size, 0n), 'a.dimensions[0]', size, /is 0/)
  assertRefused(write(size, 2n ** 60n), 'a.dimensions[0]', size, /too large/)
  assertRefused(write32(type, 31), 'a.type', type, /is 31, a tensor type that ggml does not have/)
  assertRefused(write32(type, 1 << 30), 'a.type', type, /a tensor type/)
  assertRefused(
    write32(type, 8),
    'a.type',
    type,
    /Q8_0, whose blocks of 32 do not divide rows of 8/,
  )
  assertRefused(write(offset, 4n), 'a.offset', offset, /not a multiple of the alignment 32/)
  assertRefused(write(offset, 32n), 'a.offset', offset, /the file has \d+ bytes/)
  assertRefused(write(offset, 2n ** 63n), 'a.offset', offset, /truncated or damaged/)
})

test('two dimensions whose product overflows are refused at the second', () => {
  const bytes = encodeGguf({
    metadata: {},
    tensors: [{ name: 'a', shape: [2 ** 31, 2 ** 31], data: new Float32Array(8) }],
  })
  assert.match(refusal(bytes).message, /a\.dimensions\[1\] at byte \d+ is 2147483648, which makes/)
})

test('tensors that share bytes are refused, and gaps between them are not', () => {
  const data = new Float32Array(16)
  const tensors = ['a', 'b', 'c'].map((name) => ({ name, shape: [16], data }))
  const bytes = encodeGguf({ metadata: {}, tensors })
  const offsetOf = (name: string) =>
    bytes.indexOf(Buffer.from(`\x01\0\0\0\0\0\0\0${name}\x01\0`)) + 9 + 4 + 8 + 4
  bytes.writeBigUInt64LE(32n, offsetOf('b'))
  assertRefused(bytes, 'b.offset', offsetOf('b'), /inside the bytes of a/)
  bytes.writeBigUInt64LE(0n, offsetOf('b'))
  assertRefused(bytes, 'b.offset', offsetOf('b'), /inside the bytes of a/)
  bytes.writeBigUInt64LE(64n, offsetOf('b'))
  parse(bytes)
  const sparse = Buffer.concat([encodeGguf({ metadata: {}, tensors }), Buffer.alloc(64)])
  sparse.writeBigUInt64LE(192n, offsetOf('c'))
  parse(sparse)
})

test('100,000 mutated headers parse or are refused, none crashes, hangs or takes memory', () => {
  const seed = Number(process.env['LATTICE_SEED'] ?? 20_260_101)
  console.log(`seed ${seed}`)
  const random = xorshift(seed)
  const below = (count: number) => Math.floor(Math.abs(random()) * count)
  const bases = [
    encodeGguf({
      metadata: {
        'general.architecture': 'llama',
        'general.alignment': 32,
        'llama.block_count': 1,
        'tokenizer.ggml.tokens': ['a', 'b', 'c'],
        'tokenizer.ggml.scores': Float32Array.of(0, 1, 2),
        nested: [[1, 2], [3]],
        flags: [true, false],
        big: 2n ** 60n,
      },
      tensors: [
        { name: 'token_embd.weight', shape: [32, 2], type: 'Q8_0', data: new Uint8Array(68) },
        { name: 'output_norm.weight', shape: [4], data: new Float32Array(4) },
      ],
    }),
    encodeGguf(ONE_TENSOR),
  ]
  const extremes = [
    0n,
    1n,
    2n ** 31n,
    2n ** 32n - 1n,
    2n ** 53n,
    2n ** 60n,
    2n ** 63n,
    2n ** 64n - 1n,
  ]
  const mutations: ((bytes: Buffer) => Buffer)[] = [
    (bytes) => {
      const at = below(bytes.byteLength)
      bytes[at] = (bytes[at] ?? 0) ^ (1 << below(8))
      return bytes
    },
    (bytes) => bytes.subarray(0, below(bytes.byteLength)),
    (bytes) => {
      const at = below(bytes.byteLength - 8)
      bytes.writeBigUInt64LE(extremes[below(extremes.length)] ?? 0n, at)
      return bytes
    },
    (bytes) => {
      const at = below(bytes.byteLength - 4)
      bytes.writeUInt32LE(below(20), at)
      return bytes
    },
    (bytes) => {
      const [from, to] = [below(bytes.byteLength), below(bytes.byteLength)]
      bytes.copyWithin(to, from, from + below(40))
      return bytes
    },
    (bytes) => {
      const at = below(bytes.byteLength)
      return Buffer.concat([bytes.subarray(0, at), bytes.subarray(at - Math.min(at, below(40)))])
    },
  ]
  let parsed = 0
  const before = process.memoryUsage().rss
  for (let round = 0; round < 100_000; round++) {
    let bytes: Buffer = Buffer.from(bases[below(bases.length)] ?? [])
    for (let count = 1 + below(3); count > 0 && bytes.byteLength > 16; count--) {
      bytes = mutations[below(mutations.length)]?.(bytes) ?? bytes
    }
    try {
      parse(bytes)
      parsed++
    } catch (thrown) {
      if (thrown instanceof LatticeError && thrown.code === 'gguf_invalid') {
        const { offset } = thrown.details
        if (typeof offset === 'number' && offset <= bytes.byteLength) continue
      }
      throw new Error(`seed ${seed}, round ${round}`, { cause: thrown })
    }
  }
  assert.ok(parsed > 1000 && parsed < 90_000, `${parsed} of 100,000 parsed`)
  assert.ok(process.memoryUsage().rss - before < 300e6)
})
