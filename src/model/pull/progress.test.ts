import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { test } from 'node:test'
import { formatBytes } from './progress.ts'

const CODE = `
  import { Progress } from '${new URL('./progress.ts', import.meta.url).href}'
  process.stderr.isTTY = process.argv[1] === 'terminal'
  const progress = new Progress('model.gguf', 1000)
  for (let i = 0; i < 1000; i++) progress.add(1)
  progress.finish()`

function shown(where: string): string {
  const env = { ...process.env, LATTICE_LOG: 'on' }
  return spawnSync(process.execPath, ['--input-type=module', '-e', CODE, '--', where], {
    env,
    encoding: 'utf8',
  }).stderr
}

test('a terminal gets one line that is redrawn, and ends at 100 %', () => {
  const text = shown('terminal')
  assert.equal(text.split('\n').length, 2)
  assert.match(text, /\r.*model.gguf █+ 100% [\d.]+ MB\/s 1.00 kB\n$/)
})

test('a log gets no control characters and only a few lines', () => {
  const text = shown('log')
  // oxlint-disable-next-line no-control-regex
  assert.doesNotMatch(text, /[\r\x1b]/)
  assert.equal(text.split('\n').length, 2)
})

test('sizes have three digits in decimal units', () => {
  const sizes = [0, 999, 1000, 98_362_432, 253e6, 1.5e12]
  const expected = ['0 B', '999 B', '1.00 kB', '98.4 MB', '253 MB', '1.50 TB']
  assert.deepEqual(sizes.map(formatBytes), expected)
})
