// Catches a ring that is another than the one asked for, or that is replaced in silence.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { chooseRing } from './ring-choice.ts'

const there = () => undefined
const missing = () => 'no such file'

test('another ring is taken than is asked for, or is replaced in silence', () => {
  assert.deepEqual(chooseRing(undefined, there), { ring: 'native' })
  assert.deepEqual(chooseRing('native', there), { ring: 'native' })
  assert.deepEqual(chooseRing('typescript', there), { ring: 'typescript' })
  assert.deepEqual(chooseRing('typescript', missing), { ring: 'typescript' })
  assert.deepEqual(chooseRing(undefined, missing), { ring: 'typescript', why: 'no such file' })
  assert.throws(() => chooseRing('native', missing), {
    code: 'net_refused',
    message: /no such file/,
  })
})
