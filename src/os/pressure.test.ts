// Catches pressure that is read as none, or none as pressure.

import assert from 'node:assert/strict'
import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { temporaryDirectory } from '../../test/support/temporary.ts'
import { memoryPressure } from './pressure.ts'

test('pressure is not read as the kernel writes it', () => {
  const root = temporaryDirectory('pressure')
  assert.equal(memoryPressure(root), undefined)
  mkdirSync(join(root, 'proc/pressure'), { recursive: true })
  const write = (text: string) => writeFileSync(join(root, 'proc/pressure/memory'), text)
  const rest = 'avg60=1.00 avg300=0.10 total=5'
  write(`some avg10=12.34 ${rest}\nfull avg10=7.00 ${rest}\n`)
  assert.equal(memoryPressure(root), 12.34)
  write('some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n')
  assert.equal(memoryPressure(root), 0)
  write('')
  assert.equal(memoryPressure(root), undefined)
})
