// Owns the checks of stop strings: against a search of the whole text, however that is split.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { LatticeError } from '../errors.ts'
import { StopMatcher } from './stop.ts'

/** The match that ends first, of those the longest, by looking at everything. */
function naive(text: string, stops: readonly string[]) {
  for (let end = 1; end <= text.length; end++) {
    const complete = stops.filter((stop) => text.slice(0, end).endsWith(stop))
    const matched = complete.toSorted((a, b) => b.length - a.length)[0]
    if (matched !== undefined) return { text: text.slice(0, end - matched.length), matched }
  }
  return { text, matched: undefined }
}

/** What may be shown of a text without a match: not its longest end that starts a stop string. */
function certain(text: string, stops: readonly string[]): string {
  for (let cut = 0; cut < text.length; cut++) {
    if (stops.some((stop) => stop.startsWith(text.slice(cut)))) return text.slice(0, cut)
  }
  return text
}

const unit = fc.constantFrom('a', 'b', 'é', '🙂')
const word = (min: number, max: number) =>
  fc.array(unit, { minLength: min, maxLength: max }).map((units) => units.join(''))

test('splitting the text changes what is shown or matched, or too little is held back', () => {
  const stops = fc.array(word(1, 5), { maxLength: 4 })
  const pieces = fc.array(word(0, 4), { maxLength: 14 })
  fc.assert(
    fc.property(stops, pieces, (stops, pieces) => {
      const expected = naive(pieces.join(''), stops)
      const matcher = new StopMatcher(stops)
      let shown = ''
      let received = ''
      for (const piece of pieces) {
        shown += matcher.push(piece)
        received += piece
        if (matcher.matched !== undefined) break
        assert.equal(shown, certain(received, stops))
        assert.ok(shown.isWellFormed())
      }
      shown += matcher.end()
      assert.deepEqual({ text: shown, matched: matcher.matched }, expected)
    }),
    { seed: 11, numRuns: 5_000 },
  )
})

test('more is held back than may become a stop string', () => {
  const matcher = new StopMatcher(['###', 'END'])
  const shown = ['one E', 'N', 'x#', '#', 'y E', 'N'].map((piece) => matcher.push(piece))
  assert.deepEqual(shown, ['one ', '', 'ENx', '', '##y ', ''])
  assert.equal(matcher.end(), 'EN')
})

test('stop strings that are empty, too long, too many or broken are taken', () => {
  const wrong = [[''], ['é'.repeat(513)], Array.from({ length: 17 }, () => 'x'), ['\ud83d']]
  for (const stops of wrong) {
    assert.throws(
      () => new StopMatcher(stops),
      (error: unknown) => error instanceof LatticeError && error.code === 'invalid_request',
    )
  }
  new StopMatcher(['x'.repeat(1024)])
})
