// Holds streamed bytes to the platform's own streaming decoder.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { StreamingDetokenizer, unfinishedBytes } from './detokenizer.ts'

/** First and last byte of every range that UTF-8 tells apart. */
const EDGES = [
  0x00, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xc1, 0xc2, 0xdf, 0xe0, 0xe1, 0xec, 0xed,
  0xee, 0xef, 0xf0, 0xf1, 0xf3, 0xf4, 0xf5, 0xff,
]

/** Whether more bytes could make one character of these. */
function isUnfinished(bytes: Uint8Array): boolean {
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes, { stream: true }) === ''
  } catch {
    return false
  }
}

function* sequences(length: number): Generator<number[]> {
  if (length === 0) return yield []
  for (const head of sequences(length - 1)) for (const byte of EDGES) yield [...head, byte]
}

test('bytes that end in the middle of a character are counted wrongly', () => {
  for (const length of [1, 2, 3, 4]) {
    for (const sequence of sequences(length)) {
      const bytes = Uint8Array.from(sequence)
      const wanted = [3, 2, 1].find((size) => size <= length && isUnfinished(bytes.slice(-size)))
      assert.equal(unfinishedBytes(bytes), wanted ?? 0, bytes.join(' '))
    }
  }
})

test('a byte order mark is swallowed', () => {
  const detokenizer = new StreamingDetokenizer(() => Buffer.from('\ufeffa'), false)
  assert.equal(detokenizer.push(0) + detokenizer.end(), '\ufeffa')
})

test('what never became a character is forgotten at the end, or said twice', () => {
  const bytes = Uint8Array.of(0xf0, 0x9f, 0x98)
  const detokenizer = new StreamingDetokenizer(() => bytes, false)
  assert.equal(detokenizer.push(0), '')
  assert.equal(detokenizer.end(), '\ufffd')
  assert.equal(detokenizer.end(), '')
})

test('more than one space is taken from the start', () => {
  const detokenizer = new StreamingDetokenizer(() => Buffer.from('  a'), true)
  assert.equal(detokenizer.push(0), ' a')
  assert.equal(detokenizer.push(0), '  a')
})
