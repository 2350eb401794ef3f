// Holds GGUF metadata loading to the sentencepiece library (tools/goldens/text_sentencepiece.py),
// and the byte-level families to the same goldens that tokenizer.json loading has.

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { test } from 'node:test'
import type { MetadataValue } from '../model/model.ts'
import { ggufTokenizer } from './load-gguf.ts'

interface SentencePieceGolden {
  tokens: string[]
  scores: number[]
  kinds: number[]
  prefix: boolean
  plain: number[][]
  decoded: Record<string, string>
}

const read = (name: string): unknown =>
  JSON.parse(readFileSync(new URL(`./goldens/${name}.json`, import.meta.url), 'utf8'))
const strings = read('strings') as string[]
const plainText = { addSpecial: false, parseSpecial: false }

function metadata(fields: Record<string, MetadataValue>): Map<string, MetadataValue> {
  const entries = Object.entries(fields)
  return new Map(entries.map(([key, value]) => [`tokenizer.ggml.${key}`, value]))
}

for (const name of ['gguf-llama', 'gguf-gemma', 'gguf-unknown']) {
  const golden = read(name) as SentencePieceGolden
  const tokenizer = ggufTokenizer(
    metadata({
      model: 'llama',
      tokens: golden.tokens,
      scores: Float32Array.from(golden.scores),
      token_type: Int32Array.from(golden.kinds),
      add_space_prefix: golden.prefix,
    }),
  )

  test(`${name}: a token differs from sentencepiece's`, () => {
    strings.forEach((string, i) => {
      const ids = [...tokenizer.encode(string, plainText)]
      assert.deepEqual(ids, golden.plain[i], JSON.stringify(string))
    })
  })

  test(`${name}: decoding gives another text than sentencepiece's`, () => {
    strings.forEach((string, i) => {
      // Without byte tokens theirs shows the unknown token as ⁇, ours as the vocabulary spells it.
      if (golden.plain[i]!.includes(0)) return
      const text = tokenizer.decode(golden.plain[i]!)
      assert.equal(text, golden.decoded[i] ?? string, JSON.stringify(string))
    })
  })
}

interface JsonGolden {
  tokenizer: {
    model: { vocab: Record<string, number>; merges: [string, string][] }
    added_tokens: { id: number; content: string; special: boolean }[]
  }
  plain: number[][]
}

/** What a converter would make of a tokenizer.json. */
function converted({ tokenizer }: JsonGolden, pre: string): Map<string, MetadataValue> {
  const tokens: string[] = []
  for (const [spelling, id] of Object.entries(tokenizer.model.vocab)) tokens[id] = spelling
  const kinds = new Int32Array(tokens.length + tokenizer.added_tokens.length).fill(1)
  for (const { id, content, special } of tokenizer.added_tokens) {
    tokens[id] = content
    kinds[id] = special ? 3 : 4
  }
  return metadata({
    model: 'gpt2',
    pre,
    tokens,
    merges: tokenizer.model.merges.map((pair) => pair.join(' ')),
    token_type: kinds.subarray(0, tokens.length),
    bos_token_id: 0,
  })
}

const FAMILIES = {
  gpt2: 'gpt-2',
  smollm: 'smollm',
  llama3: 'llama-bpe',
  qwen2: 'qwen2',
  gpt4o: 'gpt-4o',
  tekken: 'tekken',
  deepseek3: 'deepseek-v3',
  falcon: 'falcon',
  'missing-bytes': 'gpt-2',
}

for (const [name, pre] of Object.entries(FAMILIES)) {
  test(`tokenizer.ggml.pre ${pre}: a token differs from Hugging Face's`, () => {
    const golden = read(name) as JsonGolden
    const tokenizer = ggufTokenizer(converted(golden, pre))
    strings.forEach((string, i) => {
      const ids = [...tokenizer.encode(string, plainText)]
      assert.deepEqual(ids, golden.plain[i], JSON.stringify(string))
    })
  })
}
