// Holds translated patterns to Oniguruma: the expected cuts are what tokenizers.pre_tokenizers.
// Split(Regex(pattern), 'isolated') of Hugging Face's library gives for the same text.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { LatticeError } from '../errors.ts'
import { split } from './pretokenize.ts'
import { compilePattern, literalPattern } from './regex.ts'

const CASES: readonly (readonly [pattern: string, text: string, cuts: string[]])[] = [
  [String.raw`\s+$`, 'a  \n b  \n\n  ', ['a', '  ', '\n b', '  \n\n  ']],
  [String.raw`^\s`, 'a\n b\n', ['a\n', ' ', 'b\n']],
  ["(?i:'s|'t)", "'ſ'S’s", ["'ſ", "'S", '’s']],
  [String.raw`a?+b`, 'ab b', ['ab', ' ', 'b']],
  [String.raw`(a)|b++`, 'abbb', ['a', 'bbb']],
  [String.raw`a{,2}`, 'aaaa', ['aa', 'aa']],
  [String.raw`a{2}+`, 'aaaaa', ['aaaa', 'a']],
  [String.raw`\b`, 'ab cd é', ['ab', ' ', 'cd', ' ', 'é']],
  [String.raw`[^a&&\w]`, 'abc', ['a', 'b', 'c']],
  [String.raw`\x41|\x{42}`, 'ABC', ['A', 'B', 'C']],
  [String.raw`(?=(\d{3})+(?!\d))`, '1234567', ['1', '234', '567']],
  ['[a-]', 'a-b', ['a', '-', 'b']],
  ['[]a]', ']ab', [']', 'a', 'b']],
  [String.raw`\p{^L}`, 'a1', ['a', '1']],
  [String.raw`\A.|.\z`, 'abc\n', ['a', 'bc\n']],
  [String.raw`\h+`, 'xCAFEg', ['x', 'CAFE', 'g']],
]

for (const [pattern, text, cuts] of CASES) {
  test(`${pattern} cuts otherwise than Oniguruma`, () => {
    const cut = split(compilePattern(pattern))
    assert.deepEqual(cut({ texts: [text], atStart: true }).texts, cuts)
  })
}

test('white space is what JavaScript takes for it', () => {
  const space = compilePattern(String.raw`^\s\z`)
  const isSpace = (char: string): boolean => char.replace(space, '') === ''
  assert.ok(isSpace('\u0085'))
  assert.ok(!isSpace('\ufeff'))
})

const REFUSED = [
  String.raw`\X`,
  '[[:punct:]]',
  '(?<name>a)',
  String.raw`\p{Nonsense}`,
  '(a',
  'a)',
  '[a',
  '*a',
  String.raw`[a-\d]`,
  String.raw`\1`,
]

for (const pattern of REFUSED) {
  test(`${pattern} is translated to something else`, () => {
    assert.throws(
      () => compilePattern(pattern),
      (error) => error instanceof LatticeError && error.code === 'model_unsupported',
    )
  })
}

test('a literal is read as a pattern', () => {
  assert.equal('a.b[c]*'.replace(literalPattern('.b[c]*'), '!'), 'a!')
})

test('a run too long for the matcher is a crash', () => {
  const cut = split(compilePattern(String.raw`[\p{Lu}\p{Lo}]*[\p{Ll}\p{Lo}]+`))
  const pieces = { texts: ['中'.repeat(16_000_000)], atStart: true }
  try {
    assert.equal(cut(pieces).texts.length, 1)
  } catch (error) {
    assert.ok(error instanceof LatticeError && error.code === 'invalid_request')
  }
})
