// Catches a hash that is right only for messages of some lengths: whole blocks, ends of every
// length, more than the machine's memory holds. The reference is the paper's text in 64-bit words.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { referenceHash } from '../../test/support/siphash.ts'
import { allPrefixHashes, hashOf, isHash } from './protocol.ts'
import { sipKey } from './siphash.ts'

const KEY = Uint8Array.from({ length: 16 }, (_, i) => i * 11)
const DATA = Uint8Array.from({ length: 140_000 }, (_, i) => (i * i) >> 3)

test('a message of some length has another hash', () => {
  const lengths = Array.from({ length: 40 }, (_, i) => i)
  for (const length of [...lengths, 255, 256, 1200, 65_463, 65_464, 65_465, 131_000, 140_000]) {
    const part = DATA.subarray(3, 3 + length)
    assert.equal(hashOf(sipKey(KEY), part), referenceHash(KEY, part), `${part.length} bytes`)
  }
})

test('a prefix of what is hashed has another hash than when it is alone', () => {
  const lengths = [0, 8, 1024, 65_464, 65_536, 131_072]
  const hashes = allPrefixHashes(sipKey(KEY), DATA, lengths)
  lengths.forEach((length, i) => {
    assert.equal(hashes[i], referenceHash(KEY, DATA.subarray(0, length)), `${length} bytes`)
  })
})

test('a hash that is wrong in one bit is right', () => {
  const bytes = new Uint8Array(32)
  const view = new DataView(bytes.buffer)
  view.setBigUint64(24, hashOf(sipKey(KEY), bytes.subarray(0, 24)))
  assert.ok(isHash(sipKey(KEY), view, 0, 24, 24))
  for (let bit = 0; bit < 64; bit++) {
    bytes[24 + (bit >> 3)]! ^= 1 << (bit & 7)
    assert.ok(!isHash(sipKey(KEY), view, 0, 24, 24), `bit ${bit}`)
    bytes[24 + (bit >> 3)]! ^= 1 << (bit & 7)
  }
})
