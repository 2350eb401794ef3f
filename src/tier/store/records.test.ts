// Catches records that do not say what they were told.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { decode, encodePut } from './records.ts'
import { SALT_BYTES } from './frames.ts'
import { TAG_BYTES } from '../../ffi/aes-gcm.ts'

test('a prefix whose columns many processes wrote stops the engine, or is mixed up', () => {
  const count = 300
  const seals = Array.from({ length: count }, (_, i) => ({
    counter: 1000 + i,
    salt: new Uint8Array(SALT_BYTES).fill(i & 255).fill(i >> 8, 0, 1),
    tag: new Uint8Array(TAG_BYTES).fill(i & 255),
  }))
  const places = Uint32Array.from({ length: count }, (_, i) => 2 * i)
  const tokens = Int32Array.of(5, 6, 7)
  const prefix = { id: 9, parent: 0, tenant: 'é', from: 0, tokens, firstColumn: 0, places }
  const record = decode(encodePut(prefix, seals))
  assert.ok(record.kind === 'put')
  assert.deepEqual(record.prefix, prefix)
  assert.deepEqual(
    record.seals.map(({ counter, salt, tag }) => [counter, [...salt], [...tag]]),
    seals.map(({ counter, salt, tag }) => [counter, [...salt], [...tag]]),
  )
})
