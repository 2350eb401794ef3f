// Holds tokenizers to what must be so for any text: round trips, streaming, lone surrogates, and
// time that does not grow with the square of the text.

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { test } from 'node:test'
import fc from 'fast-check'
import { jsonTokenizer } from './load-json.ts'
import type { Detokenizer, Tokenizer } from './tokenizer.ts'

const seed = Number(process.env['LATTICE_TEST_SEED'] ?? Date.now() % 2 ** 31)
console.log(`seed ${seed} (LATTICE_TEST_SEED repeats it)`)
const runs = { seed, numRuns: 500 }

function load(name: string): Tokenizer {
  const text = readFileSync(new URL(`./goldens/${name}.json`, import.meta.url), 'utf8')
  const { tokenizer } = JSON.parse(text) as { tokenizer: unknown }
  return jsonTokenizer(tokenizer, { bos: '<s>', eos: '<|end|>', ends: [] })
}

/** Any code units at all, and strings that look like text. */
const anyText = fc.oneof(
  fc.string({ unit: 'binary', maxLength: 60 }),
  fc.string({ unit: 'grapheme', maxLength: 60 }),
  fc.array(fc.nat(0xffff), { maxLength: 40 }).map((units) => String.fromCharCode(...units)),
  fc
    .array(fc.constantFrom(' ', '\n', 'a', "'s", '12', 'é', '中', '😀', '<|end|>', '\ud83d', '▁'))
    .map((parts) => parts.join('')),
)

const BYTE_LEVEL = ['gpt2', 'smollm', 'llama3', 'gpt4o', 'tekken', 'deepseek3', 'falcon', 'han']

for (const name of BYTE_LEVEL) {
  const tokenizer = load(name)
  test(`${name}: text does not survive encoding and decoding`, () => {
    fc.assert(
      fc.property(anyText, fc.boolean(), (text, parseSpecial) => {
        const ids = tokenizer.encode(text, { addSpecial: false, parseSpecial })
        assert.equal(tokenizer.decode(ids), text.toWellFormed())
      }),
      runs,
    )
  })
}

for (const name of ['gpt2', 'llama3', 'tekken']) {
  const tokenizer = load(name)
  test(`${name}: bytes become other tokens than the text that they are`, () => {
    fc.assert(
      fc.property(anyText, fc.boolean(), (text, addSpecial) => {
        const ids = [...tokenizer.encodeUtf8!(Buffer.from(text), addSpecial)!]
        assert.deepEqual(ids, [...tokenizer.encode(text, { addSpecial, parseSpecial: false })])
      }),
      runs,
    )
  })
}

const drain = (detokenizer: Detokenizer, ids: Iterable<number>): string[] => {
  const pieces = Array.from(ids, (id) => detokenizer.push(id))
  return [...pieces, detokenizer.end()]
}

for (const name of ['gpt2', 'llama3', 'spm-bpe', 'gemma-bpe', 'unigram']) {
  const tokenizer = load(name)
  const anyTokens = fc.array(fc.nat(tokenizer.vocabSize - 1), { maxLength: 60 })

  test(`${name}: streamed text is not the text decoded at once, for any tokens`, () => {
    fc.assert(
      fc.property(anyTokens, fc.boolean(), (ids, skipSpecial) => {
        const pieces = drain(tokenizer.detokenizer({ skipSpecial, fromStart: true }), ids)
        assert.equal(pieces.join(''), tokenizer.decode(ids, { skipSpecial }))
      }),
      runs,
    )
  })

  test(`${name}: half a character is streamed`, () => {
    fc.assert(
      fc.property(anyText, (text) => {
        const ids = tokenizer.encode(text, { addSpecial: false, parseSpecial: false })
        for (const piece of drain(tokenizer.detokenizer(), ids)) {
          assert.ok(piece.isWellFormed())
          // U+FFFD only where the text itself has it.
          assert.ok(!piece.includes('\ufffd') || text.toWellFormed().includes('\ufffd'))
        }
      }),
      runs,
    )
  })
}

for (const name of ['deepseek3', 'gemma-bpe', 'metaspace-first', 'unigram']) {
  const tokenizer = load(name)
  test(`${name}: a lone surrogate is not U+FFFD`, () => {
    fc.assert(
      fc.property(anyText, (text) => {
        const options = { addSpecial: false, parseSpecial: false }
        const ids = [...tokenizer.encode(text, options)]
        assert.deepEqual(ids, [...tokenizer.encode(text.toWellFormed(), options)])
      }),
      runs,
    )
  })
}

test('a token is not what its bytes say', () => {
  const tokenizer = load('gpt2')
  const ids = [...tokenizer.encode('héllo wörld 😀', { addSpecial: false, parseSpecial: false })]
  const bytes = Buffer.concat(ids.map((id) => tokenizer.tokenBytes(id, false)))
  assert.equal(bytes.toString('utf8'), 'héllo wörld 😀')
})

const LONG: Record<string, string> = {
  'one letter': 'a'.repeat(100_000),
  'two letters': 'ab'.repeat(50_000),
  spaces: `${' '.repeat(100_000)}x`,
  newlines: '\n'.repeat(100_000),
  han: '中文'.repeat(50_000),
  emoji: '😀'.repeat(50_000),
  marks: 'a\u0301'.repeat(50_000),
  'half of special tokens': '<|end'.repeat(20_000),
}
// Quadratic time would be minutes here.
const LONG_MS_MAX = 5_000

for (const name of [
  'gpt2',
  'llama3',
  'gpt4o',
  'deepseek3',
  'spm-bpe',
  'metaspace-first',
  'unigram',
]) {
  const tokenizer = load(name)
  test(`${name}: a long run without a boundary takes quadratic time`, () => {
    for (const [what, text] of Object.entries(LONG)) {
      const start = performance.now()
      const ids = tokenizer.encode(text, { addSpecial: false, parseSpecial: true })
      const ms = performance.now() - start
      assert.ok(ms < LONG_MS_MAX, `${what}: ${ms.toFixed(0)} ms`)
      assert.ok(ids.length > 0)
    }
  })
}

test('a special token that a user typed is parsed as one', () => {
  const tokenizer = load('llama3')
  const end = tokenizer.encode('<|end|>', { addSpecial: false, parseSpecial: true })
  assert.equal(end.length, 1)
  assert.ok(tokenizer.isSpecial(end[0]!))
  const typed = tokenizer.encode('<|end|>', { addSpecial: false, parseSpecial: false })
  assert.ok(typed.length > 1)
  assert.ok(!typed.includes(end[0]!))
  assert.equal(tokenizer.decode(typed, { skipSpecial: true }), '<|end|>')
})

test('a second begin token is added to a text that begins with one', () => {
  const tokenizer = load('llama3')
  const bos = tokenizer.bosToken!
  const encode = (text: string, parseSpecial: boolean): number[] => [
    ...tokenizer.encode(text, { addSpecial: true, parseSpecial }),
  ]
  assert.deepEqual(encode('<s>hi', true), encode('hi', true))
  assert.equal(encode('hi', true)[0], bos)
  assert.deepEqual(encode('<s><s>', true), [bos, bos], 'only the added one is dropped')
  assert.notEqual(encode('<s>hi', false)[1], bos, 'typed text is not a token')
})

test('a turn does not end because its end token is not known', () => {
  assert.ok(
    load('gpt2').eosTokens.includes(
      load('gpt2').encode('<|end|>', {
        addSpecial: false,
        parseSpecial: true,
      })[0]!,
    ),
  )
})

test('the first word of a reply loses its space', () => {
  const tokenizer = load('spm-bpe')
  const ids = [...tokenizer.encode('the page', { addSpecial: false, parseSpecial: false })]
  assert.equal(tokenizer.decode(ids), 'the page')
  assert.equal(drain(tokenizer.detokenizer(), ids).join(''), ' the page')
  assert.equal(drain(tokenizer.detokenizer({ fromStart: true }), ids).join(''), 'the page')
})
