// Catches words of a model that would command the terminal.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { printable } from './terminal.ts'

test('escape sequences become visible, text stays', () => {
  assert.equal(printable('a\tb\nc é 漢 🙂'), 'a\tb\nc é 漢 🙂')
  assert.equal(printable('\x1b[2J\x1b]0;title\x07'), '␛[2J␛]0;title␇')
  assert.equal(printable('x\r\x7f\x9b31m'), 'x␍␡�31m')
})
