import assert from 'node:assert/strict'
import { readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import {
  encodeSafetensors,
  type TinySafeTensor,
  withHeader,
  writeModelDirectory,
} from '../../test/support/tiny-safetensors.ts'
import { xorshift } from '../../test/support/tiny-gguf.ts'
import { LatticeError } from '../errors.ts'
import { memorySource } from './byte-source.ts'
import { openModel } from './load.ts'
import { parseSafetensors } from './safetensors.ts'

const goldens = JSON.parse(
  readFileSync(new URL('../../test/goldens/model-configs.json', import.meta.url), 'utf8'),
) as { name: string; saved: object; expected: { tensors: Record<string, number[]> } }[]

function golden(name: string) {
  const found = goldens.find((one) => one.name === name)
  assert.ok(found)
  const tensors = Object.entries(found.expected.tensors).map(([tensor, shape]) => ({
    name: tensor,
    shape,
  }))
  return { config: found.saved, tensors: tensors as TinySafeTensor[] }
}

function parse(bytes: Uint8Array) {
  return parseSafetensors(memorySource('test.safetensors', bytes))
}

function assertRefused(run: () => unknown, code: string, message: RegExp, details?: object): void {
  assert.throws(run, (thrown) => {
    assert.ok(thrown instanceof LatticeError, String(thrown))
    assert.equal(thrown.code, code)
    assert.match(thrown.message, message)
    if (details) assert.deepEqual(thrown.details, details)
    return true
  })
}

const entry = (shape: number[], begin: number, end: number, dtype = 'F32') => ({
  dtype,
  shape,
  data_offsets: [begin, end],
})

function file(header: unknown, dataBytes: number): Buffer {
  return withHeader(JSON.stringify(header), new Uint8Array(dataBytes))
}

test('tensors lie where the header says, whatever their order in it', () => {
  const { tensors } = parse(file({ b: entry([2], 12, 20), a: entry([3, 1], 0, 12) }, 20))
  assert.deepEqual(
    tensors.map(({ name, shape }) => [name, shape]),
    [
      ['a', [3, 1]],
      ['b', [2]],
    ],
  )
  assert.equal((tensors[1]?.offset ?? 0) - (tensors[0]?.offset ?? 0), 12)
})

test('headers that are too short, too long, or no JSON object are refused', () => {
  const length = (value: bigint, rest = 100) => {
    const bytes = Buffer.alloc(8 + rest)
    bytes.writeBigUInt64LE(value)
    return bytes
  }
  const at0 = { field: 'header_length', offset: 0 }
  assertRefused(() => parse(Buffer.alloc(7)), 'safetensors_invalid', /needs 8 bytes/, at0)
  assertRefused(() => parse(length(2n ** 60n)), 'safetensors_invalid', /only 100 bytes/, at0)
  assertRefused(() => parse(length(101n)), 'safetensors_invalid', /is 101/, at0)
  const huge = memorySource('huge', length(40_000_000n))
  const lying = { ...huge, byteLength: 1e12 }
  assertRefused(() => parseSafetensors(lying), 'safetensors_invalid', /more than the 33554432/, at0)
  for (const text of ['', '{', '[]', 'null', '"a"', '[[[[']) {
    const bytes = withHeader(text, new Uint8Array())
    assertRefused(() => parse(bytes), 'safetensors_invalid', /no JSON/, {
      field: 'header',
      offset: 8,
    })
  }
})

test('entries that contradict themselves or the file are refused by name', () => {
  const refused: [unknown, number, string, RegExp][] = [
    [{ a: 1 }, 0, 'a', /is no object/],
    [{ a: { ...entry([2], 0, 8), dtype: 'F31' } }, 8, 'a.dtype', /"F31"/],
    [{ a: { ...entry([2], 0, 8), dtype: 'toString' } }, 8, 'a.dtype', /"toString"/],
    [{ a: { ...entry([2], 0, 8), shape: [-2] } }, 8, 'a.shape', /not a list of sizes/],
    [{ a: { ...entry([2], 0, 8), shape: [1.5] } }, 8, 'a.shape', /not a list of sizes/],
    [{ a: { ...entry([2], 0, 8), shape: [2 ** 40, 2 ** 40] } }, 8, 'a.shape', /too large/],
    [{ a: { ...entry([2], 0, 8), data_offsets: [0] } }, 8, 'a.data_offsets', /not two offsets/],
    [{ a: entry([2], 8, 0) }, 8, 'a.data_offsets', /span -8 bytes/],
    [{ a: entry([2], 0, 4) }, 8, 'a.data_offsets', /span 4 bytes, but F32 \[2\] has 8/],
    [{ a: entry([2], 0, 8) }, 4, 'a.data_offsets', /truncated or damaged/],
    [{ a: entry([2], 0, 8), b: entry([2], 4, 12) }, 12, 'b.data_offsets', /overlap/],
    [{ a: entry([2], 0, 8), b: entry([2], 12, 20) }, 20, 'b.data_offsets', /leave 4 bytes unused/],
    [{ a: entry([2], 0, 8) }, 9, 'data_offsets', /has 70 bytes, but it has 71/],
  ]
  for (const [header, dataBytes, field, message] of refused) {
    const bytes = file(header, dataBytes)
    const name = field.split('.')[0] ?? ''
    const offset = field === 'data_offsets' ? 8 : bytes.indexOf(`"${name}"`)
    assertRefused(() => parse(bytes), 'safetensors_invalid', message, { field, offset })
  }
})

test('a directory opens with canonical names, ggml shapes, template and end tokens', () => {
  const { config, tensors } = golden('gemma3')
  const directory = writeModelDirectory({
    'model.safetensors': encodeSafetensors(tensors),
    'config.json': { ...config, eos_token_id: 1 },
    'generation_config.json': { eos_token_id: [1, 106] },
    'tokenizer.json': { model: { type: 'BPE' } },
    'tokenizer_config.json': { chat_template: 'from the configuration', eos_token: '<eos>' },
    'chat_template.jinja': 'from the file',
  })
  const model = openModel(directory)
  assert.deepEqual(
    [model.format, model.config.architecture, model.config.name],
    ['safetensors', 'gemma3', 'tiny-model'],
  )
  assert.deepEqual(model.tensors.get('blk.0.ffn_up.weight')?.shape, [16, 24])
  assert.deepEqual(model.tensors.get('blk.6.attn_q_norm.weight')?.shape, [8])
  assert.equal(model.tensors.get('token_embd.weight')?.type, 'BF16')
  assert.equal(model.normWeightOffset, 1)
  assert.equal(model.chatTemplate, 'from the file')
  assert.deepEqual(model.eosTokens, [1, 106])
  assert.deepEqual(model.tokenizerJson, { model: { type: 'BPE' } })
  rmSync(join(directory, 'chat_template.jinja'))
  rmSync(join(directory, 'generation_config.json'))
  const again = openModel(directory)
  assert.deepEqual([again.chatTemplate, again.eosTokens], ['from the configuration', [1]])
  const named = [
    { name: 'tool_use', template: 'tools' },
    { name: 'default', template: 'plain' },
  ]
  writeFileSync(join(directory, 'tokenizer_config.json'), JSON.stringify({ chat_template: named }))
  assert.equal(openModel(directory).chatTemplate, 'plain')
})

test('a sharded directory opens, and lies in its index are refused', () => {
  const { config, tensors } = golden('qwen2')
  const half = Math.ceil(tensors.length / 2)
  const names = ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'] as const
  const map = Object.fromEntries(tensors.map(({ name }, i) => [name, names[i < half ? 0 : 1]]))
  const files = {
    [names[0]]: encodeSafetensors(tensors.slice(0, half)),
    [names[1]]: encodeSafetensors(
      tensors.slice(half).map((one) => ({ ...one, dtype: 'F16' as const })),
    ),
    'model.safetensors.index.json': { weight_map: map },
    'config.json': config,
    'tokenizer.json': {},
  }
  const model = openModel(writeModelDirectory(files))
  assert.deepEqual(
    new Set([...model.tensors.values()].map(({ file: index }) => index)),
    new Set([0, 1]),
  )
  assert.equal(model.tensors.get('blk.0.attn_q.bias')?.shape.length, 1)
  const withMap = (weightMap: unknown) =>
    writeModelDirectory({ ...files, 'model.safetensors.index.json': { weight_map: weightMap } })
  for (const name of ['../model.safetensors', '/etc/passwd', '..', '', 7]) {
    const directory = withMap({ ...map, x: name })
    assertRefused(() => openModel(directory), 'safetensors_invalid', /no file beside it/)
  }
  assertRefused(() => openModel(withMap({})), 'safetensors_invalid', /names no file/)
  assertRefused(() => openModel(withMap(null)), 'safetensors_invalid', /no weight_map/)
  const absent = withMap({ ...map, x: 'model-00003-of-00003.safetensors' })
  assertRefused(() => openModel(absent), 'model_not_found', /model-00003/)
  const twice = writeModelDirectory({ ...files, [names[1]]: encodeSafetensors(tensors) })
  assertRefused(() => openModel(twice), 'safetensors_invalid', /is there twice/)
})

test('directories that lack something, or hold types that cannot be run, are refused', () => {
  const { config, tensors } = golden('llama-biased')
  const files = {
    'model.safetensors': encodeSafetensors(tensors),
    'config.json': config,
    'tokenizer.json': {},
  }
  openModel(writeModelDirectory(files))
  const { 'tokenizer.json': _, ...mute } = files
  assertRefused(
    () => openModel(writeModelDirectory(mute)),
    'model_unsupported',
    /no tokenizer.json/,
  )
  const { 'config.json': __, ...bare } = files
  assertRefused(() => openModel(writeModelDirectory(bare)), 'model_not_found', /config.json/)
  const unbiased = tensors.filter(({ name }) => !name.endsWith('mlp.up_proj.bias'))
  const lacking = writeModelDirectory({
    ...files,
    'model.safetensors': encodeSafetensors(unbiased),
  })
  assertRefused(() => openModel(lacking), 'model_unsupported', /blk.0.ffn_up.bias/)
  const quantized = file({ 'model.norm.weight': entry([16], 0, 16, 'F8_E4M3') }, 16)
  const eight = writeModelDirectory({ ...files, 'model.safetensors': quantized })
  assertRefused(() => openModel(eight), 'model_unsupported', /model.norm.weight is of type F8_E4M3/)
  const broken = writeModelDirectory({ ...files, 'config.json': '{"model_type"' })
  assertRefused(() => openModel(broken), 'safetensors_invalid', /config.json is no JSON/)
})

test('an output matrix stored beside a tied embedding is left out, as transformers does', () => {
  const { config, tensors } = golden('llama')
  const doubled = [...tensors, { name: 'lm_head.weight', shape: [40, 16] }]
  const model = openModel(
    writeModelDirectory({
      'model.safetensors': encodeSafetensors(doubled),
      'config.json': config,
      'tokenizer.json': {},
    }),
  )
  assert.equal(model.tensors.has('output.weight'), false)
})

test('20,000 mutated headers parse or are refused, none crashes', () => {
  const seed = Number(process.env['LATTICE_SEED'] ?? 20_260_103)
  console.log(`seed ${seed}`)
  const random = xorshift(seed)
  const below = (count: number) => Math.floor(Math.abs(random()) * count)
  const base = encodeSafetensors([
    { name: 'model.embed_tokens.weight', shape: [4, 3] },
    { name: 'model.norm.weight', shape: [3], dtype: 'F32' },
  ])
  const pieces = [
    '{',
    '}',
    '[',
    ']',
    '"',
    ',',
    ':',
    '-1',
    '1e99',
    '9007199254740993',
    'null',
    '\\u0000',
  ]
  let parsed = 0
  for (let round = 0; round < 20_000; round++) {
    let bytes: Buffer = Buffer.from(base)
    for (let count = 1 + below(3); count > 0; count--) {
      const at = below(bytes.byteLength)
      const kind = below(4)
      if (kind === 0) bytes[at] = (bytes[at] ?? 0) ^ (1 << below(8))
      else if (kind === 1) bytes.write(pieces[below(pieces.length)] ?? '', at)
      else if (kind === 2) bytes[at] = 0x30 + below(10)
      else if (below(4) === 0) bytes = bytes.subarray(0, at)
    }
    try {
      parse(bytes)
      parsed++
    } catch (thrown) {
      if (thrown instanceof LatticeError && thrown.code === 'safetensors_invalid') continue
      throw new Error(`seed ${seed}, round ${round}`, { cause: thrown })
    }
  }
  assert.ok(parsed > 500 && parsed < 19_000, `${parsed} of 20,000 parsed`)
})
