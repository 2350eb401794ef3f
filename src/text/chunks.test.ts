// Holds the memory of encoded stretches to what the pre-tokenizers do without it: wherever it cuts
// a text, they would have cut it too, and nothing on one side depends on the other.

import assert from 'node:assert/strict'
import { readdirSync, readFileSync } from 'node:fs'
import { test } from 'node:test'
import fc from 'fast-check'
import { ChunkCache, isWordCut } from './chunks.ts'
import { FAMILY_NAMES, preTokenizerFamily } from './gguf-pretokenizers.ts'
import { readPreTokenizer } from './json-pretokenizers.ts'
import type { PreTokenizer } from './pretokenize.ts'

const seed = Number(process.env['LATTICE_TEST_SEED'] ?? Date.now() % 2 ** 31)
console.log(`seed ${seed} (LATTICE_TEST_SEED repeats it)`)
const runs = { seed, numRuns: 1500 }

/** Text of what patterns tell apart, with many beginnings of words. */
const anyText = fc.oneof(
  fc
    .array(
      fc.oneof(
        fc.constantFrom(
          ...[' a', ' a', ' B', ' the', ' Word', ' ', '  ', '\n', '\r\n', '\t', "'s", "'", "'LL"],
          ...['1', '23', '4567', ',', '.', '-', '/', '$', '+', '_', '`', '"', '(', '~', '\u007f'],
          ...['é', 'É', '\u0301', '中', 'ㄱ', 'か', '😀', '\u00a0', '\u2028', '²', 'ſ', 'ǅ', '▁'],
        ),
        fc.string({ unit: 'binary', maxLength: 3 }),
      ),
      { maxLength: 24 },
    )
    .map((parts) => parts.join('')),
  fc.string({ unit: 'grapheme-ascii', maxLength: 60 }),
)

function stretches(text: string): string[] {
  const units = Uint16Array.from({ length: text.length + 1 }, (_, i) => text.charCodeAt(i) || 0)
  const at = [...units.keys()].filter((i) => i > 0 && i < text.length && isWordCut(units, i))
  return [0, ...at].map((from, i) => text.slice(from, at[i] ?? text.length)).filter((t) => t !== '')
}

function holds(name: string, preTokenize: PreTokenizer): void {
  test(`${name}: a text cut where words begin becomes other pieces`, () => {
    assert.equal(preTokenize.atWords, 'cuts')
    fc.assert(
      fc.property(anyText, (text) => {
        const whole = preTokenize({ texts: [text], atStart: true }).texts
        const cut = stretches(text).flatMap(
          (stretch) => preTokenize({ texts: [stretch], atStart: false }).texts,
        )
        assert.deepEqual(cut, whole)
      }),
      runs,
    )
  })
}

/** Theirs keep "$ $" together, so nothing that follows a space would be safe but a letter. */
const UNCUT = ['deepseek-llm', 'deepseek-coder']

for (const name of FAMILY_NAMES) {
  const { preTokenize } = preTokenizerFamily(name)
  if (UNCUT.includes(name)) assert.equal(preTokenize.atWords, undefined)
  else holds(`gguf ${name}`, preTokenize)
}

const folder = new URL('./goldens/', import.meta.url)
const CUT = ['deepseek3', 'falcon', 'gpt2', 'gpt4o', 'llama3', 'qwen2', 'smollm', 'tekken']
for (const file of readdirSync(folder).filter((each) => each.endsWith('.json'))) {
  const golden = JSON.parse(readFileSync(new URL(file, folder), 'utf8')) as {
    tokenizer?: { pre_tokenizer?: never }
  }
  const json = golden.tokenizer?.pre_tokenizer
  if (!json || file.startsWith('gguf-')) continue
  const { preTokenize } = readPreTokenizer(json)
  const name = file.replace('.json', '')
  if (preTokenize.atWords === 'cuts') holds(`json ${name}`, preTokenize)
  else assert.ok(!CUT.includes(name), `${name} is cut where words begin`)
}

/** Encodes a stretch as its code units, and counts how often it had to. */
function counted(): { cache: ChunkCache; encoded: string[]; tokens: (text: string) => number[] } {
  const encoded: string[] = []
  const cache = new ChunkCache((stretch, out) => {
    encoded.push(stretch)
    for (let i = 0; i < stretch.length; i++) out.push(stretch.charCodeAt(i))
  })
  const tokens = (text: string): number[] => {
    const out: number[] = []
    cache.encode(text, out)
    return out
  }
  return { cache, encoded, tokens }
}

const unitsOf = (text: string): number[] => text.split('').map((unit) => unit.charCodeAt(0))

test('a stretch is taken for another one', () => {
  const { tokens } = counted()
  fc.assert(
    fc.property(anyText, (text) => assert.deepEqual(tokens(text), unitsOf(text))),
    runs,
  )
})

test('what was encoded before is encoded again', () => {
  const { encoded, tokens } = counted()
  tokens('Why is the sky so blue, and so far?')
  assert.deepEqual(encoded, ['Why', ' is', ' the', ' sky', ' so', ' blue,', ' and', ' far?'])
  encoded.length = 0
  tokens('Why is the sky so blue, and so far? Why')
  assert.deepEqual(encoded, [' Why'])
})

test('more stretches than are kept: wrong tokens, or what is used all the time is lost', () => {
  const { encoded, tokens } = counted()
  for (let i = 0; i < 100_000; i++) {
    const text = `Usual x${i}y`
    if (i > 0) encoded.length = 0
    assert.deepEqual(tokens(text), unitsOf(text))
    if (i > 0) assert.deepEqual(encoded, [` x${i}y`])
  }
})

test('a stretch that is too long to be kept is wrong, or one as long as a text', () => {
  const { encoded, tokens } = counted()
  const long = `${'a'.repeat(100)} ${'b'.repeat(200_000)} c`
  for (let i = 0; i < 2; i++) assert.deepEqual(tokens(long), unitsOf(long))
  assert.deepEqual(
    encoded.map(({ length }) => length),
    [100, 200_001, 2, 100, 200_001],
  )
})
