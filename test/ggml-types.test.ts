import assert from 'node:assert/strict'
import { readdirSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { test } from 'node:test'
import koffi from 'koffi'
import { GGML_TYPES, type GgmlType, ggmlTypeById } from '../src/model/ggml-types.ts'

function ggmlBase(): string {
  const entry = createRequire(import.meta.url).resolve('@node-llama-cpp/linux-x64')
  const root = dirname(dirname(entry))
  const found = readdirSync(root, { recursive: true, encoding: 'utf8' })
  return join(root, found.find((name) => name.endsWith('libggml-base.so')) ?? '')
}

test("a tensor type whose size differs from the library's, or that the table lacks", () => {
  const library = koffi.load(ggmlBase())
  const blockSize = library.func('int64_t ggml_blck_size(int)')
  const blockBytes = library.func('size_t ggml_type_size(int)')
  const name = library.func('const char *ggml_type_name(int)')
  // 43 is GGML_TYPE_COUNT: past it the library reads beyond its table.
  for (let id = 0; id < 43; id++) {
    const known = ggmlTypeById(id)
    const expected =
      Number(blockSize(id)) === 0
        ? undefined
        : [String(name(id)).toUpperCase(), Number(blockSize(id)), Number(blockBytes(id))]
    const actual = known && [known, GGML_TYPES[known].blockSize, GGML_TYPES[known].blockBytes]
    assert.deepEqual(actual, expected, `type ${id}`)
  }
  const ids = (Object.keys(GGML_TYPES) as GgmlType[]).map((type) => GGML_TYPES[type].id)
  assert.ok(ids.every((id) => id < 43))
})
