// Holds tokenizer.json loading to Hugging Face's tokenizers library: small tokenizers of every
// family and their encodings, written by tools/goldens/text_tokenizers.py.

import assert from 'node:assert/strict'
import { readdirSync, readFileSync } from 'node:fs'
import { test } from 'node:test'
import { jsonTokenizer } from './load-json.ts'

interface Golden {
  tokenizer: unknown
  /** Ids without special tokens added or parsed, by string. */
  plain: number[][]
  /** Ids with them, where they differ; by the string's index. */
  parsed: Record<string, number[]>
  /** Text of the parsed ids without special tokens, where it is not the string again. */
  decoded: Record<string, string>
}

const folder = new URL('./goldens/', import.meta.url)
const read = (name: string): unknown => JSON.parse(readFileSync(new URL(name, folder), 'utf8'))
const strings = read('strings.json') as string[]

const names = readdirSync(folder).filter(
  (name) => name !== 'strings.json' && name.endsWith('.json') && !name.startsWith('gguf-'),
)
assert.ok(names.length >= 20, 'the golden files are here')

/** Those that have nothing but words, which need no string to be found. */
const FROM_BYTES = ['deepseek3', 'falcon', 'gpt2', 'gpt4o', 'llama3', 'smollm', 'tekken']

for (const name of names) {
  const golden = read(name) as Golden
  const tokenizer = jsonTokenizer(golden.tokenizer, { bos: '<s>', eos: undefined, ends: [] })

  test(`${name}: a token differs from Hugging Face's where special tokens stay text`, () => {
    strings.forEach((string, i) => {
      const ids = tokenizer.encode(string, { addSpecial: false, parseSpecial: false })
      assert.deepEqual([...ids], golden.plain[i], JSON.stringify(string))
    })
  })

  test(`${name}: a token differs where text is given as bytes`, () => {
    strings.forEach((string, i) => {
      const utf8 = Buffer.from(string)
      const ids = tokenizer.encodeUtf8?.(utf8, false)
      if (FROM_BYTES.includes(name.replace('.json', ''))) assert.ok(ids)
      if (!ids) return
      assert.deepEqual([...ids], golden.plain[i], JSON.stringify(string))
      const wanted = tokenizer.encode(string, { addSpecial: true, parseSpecial: false })
      assert.deepEqual(tokenizer.encodeUtf8!(utf8, true), wanted, JSON.stringify(string))
    })
  })

  test(`${name}: a token differs from Hugging Face's where special tokens are parsed`, () => {
    strings.forEach((string, i) => {
      const ids = tokenizer.encode(string, { addSpecial: true, parseSpecial: true })
      let wanted = golden.parsed[i] ?? golden.plain[i]!
      // Theirs adds a second begin token to a text that has one.
      const bos = tokenizer.bosToken
      if (bos !== undefined && wanted[0] === bos && wanted[1] === bos) wanted = wanted.slice(1)
      assert.deepEqual([...ids], wanted, JSON.stringify(string))
    })
  })

  test(`${name}: decoding gives another text than Hugging Face's`, () => {
    strings.forEach((string, i) => {
      const ids = golden.parsed[i] ?? golden.plain[i]!
      const wanted = golden.decoded[i] ?? string
      assert.equal(tokenizer.decode(ids, { skipSpecial: true }), wanted, JSON.stringify(string))
    })
  })
}
