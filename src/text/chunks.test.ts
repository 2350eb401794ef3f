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
import { TokenBuffer } from './words.ts'

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
    .map((parts) => parts.join('').toWellFormed()),
  fc.string({ unit: 'grapheme-ascii', maxLength: 60 }),
)

function stretches(text: string): string[] {
  const utf8 = Buffer.from(`${text}\0`)
  const end = utf8.length - 1
  const at = [...utf8.keys()].filter((i) => i > 0 && i < end && isWordCut(utf8, i))
  const ends = [...at, end]
  return [0, ...at].map((from, i) => utf8.toString('utf8', from, ends[i])).filter((t) => t !== '')
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
function counted(): { encoded: string[]; tokens: (text: string) => number[] } {
  const encoded: string[] = []
  const out = new TokenBuffer()
  const cache = new ChunkCache((stretch, to) => {
    encoded.push(stretch)
    for (const unit of unitsOf(stretch)) to.push(unit)
  })
  const tokens = (text: string): number[] => {
    cache.encode(text, out)
    return [...out.take()]
  }
  return { encoded, tokens }
}

const unitsOf = (text: string): number[] => text.split('').map((unit) => unit.charCodeAt(0))

test('a stretch is taken for another one, or ends elsewhere than where text is cut', () => {
  const { encoded, tokens } = counted()
  fc.assert(
    fc.property(anyText, (text) => {
      encoded.length = 0
      assert.deepEqual(tokens(text), unitsOf(text))
      const all = stretches(text)
      assert.ok(encoded.every((stretch) => all.includes(stretch)))
      assert.deepEqual(tokens(text), unitsOf(text))
    }),
    runs,
  )
})

test('a text that ends, or goes on after what is not known, at some place is cut elsewhere', () => {
  const { encoded, tokens } = counted()
  // Of words that 64 bytes begin and end at each place of.
  const long = Array.from({ length: 60 }, (_, i) => `w${'x'.repeat(i % 13)}`).join(' ')
  for (let length = 0; length <= long.length; length++) {
    const text = long.slice(0, length)
    assert.deepEqual(tokens(text), unitsOf(text))
  }
  // Each is known by now, but for one at a time.
  for (let at = long.indexOf(' '); at > 0; at = long.indexOf(' ', at + 1)) {
    encoded.length = 0
    const text = `${long.slice(0, at)} new${at}${long.slice(at)}`
    assert.deepEqual(tokens(text), unitsOf(text))
    assert.deepEqual(encoded, [` new${at}`])
  }
})

test('what was encoded before is encoded again', () => {
  const { encoded, tokens } = counted()
  tokens('Why is the sky so blue, and so far?')
  assert.deepEqual(encoded, ['Why', ' is', ' the', ' sky', ' so', ' blue,', ' and', ' far?'])
  encoded.length = 0
  tokens('Why is the sky so blue, and so far? Why')
  assert.deepEqual(encoded, [' Why'])
})

test('stretches of all lengths, or of one to many tokens, are mixed up', () => {
  const spelled = new Map<string, number[]>()
  const out = new TokenBuffer()
  const cache = new ChunkCache((stretch, to) => {
    for (const token of spelled.get(stretch) ?? []) to.push(token)
  })
  // Alike but for their last byte, the last bytes of each length, and how many tokens they are.
  for (let length = 2; length <= 140; length++) {
    for (let count = 0; count < 5; count++) {
      const word = ` ${'x'.repeat(length - 2)}${String.fromCharCode(97 + count)}`
      spelled.set(
        word,
        Array.from({ length: count }, (_, i) => length * 1000 + count * 10 + i),
      )
    }
  }
  const text = [...spelled.keys()].join('')
  const wanted = [...spelled.values()].flat()
  // The first one begins without a space before it that would cut it off.
  for (let i = 0; i < 3; i++) {
    cache.encode(text, out)
    assert.deepEqual([...out.take()], wanted)
  }
})

test('more stretches than are kept become wrong tokens', () => {
  const { encoded, tokens } = counted()
  for (let i = 0; i < 100_000; i++) {
    const text = `Usual x${i}y`
    assert.deepEqual(tokens(text), unitsOf(text))
  }
  // It is forgotten with all others, now and then.
  const usual = encoded.filter((stretch) => stretch === 'Usual').length
  assert.ok(usual < 6, `encoded ${usual} times`)
})

test('a text of many blocks, or a stretch longer than one, is cut at the wrong place', () => {
  const { encoded, tokens } = counted()
  const runs = [200, 200_000].map((count) => 'b'.repeat(count)).join(' ')
  const long = `${runs} c${' word'.repeat(20_000)} é${'中'.repeat(30_000)} d`
  for (let i = 0; i < 2; i++) assert.deepEqual(tokens(long), unitsOf(long))
  const lengths = encoded.map(({ length }) => length)
  assert.deepEqual(lengths, [200, 200_001, 2, 5, 30_009, 200, 200_001, 30_009])
})
