// Catches a `lattice run` that mixes other words into its answer, loses stdin, or hangs on Ctrl-C.

import assert from 'node:assert/strict'
import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { temporaryDirectory } from '../support/temporary.ts'
import { lattice, start } from './lattice.ts'

test('stdout carries the answer only', async () => {
  const { code, stdout, stderr } = await lattice(['run', 'why', 'sky', '--max-tokens', '3'])
  assert.equal(code, 0)
  assert.equal(stdout, '[user:why sky;] w0 w1 w2\n')
  assert.match(stderr, /stopped after 3 tokens/)
})

test('a model that is named as other programs want it is taken for a word in silence', async () => {
  const home = temporaryDirectory('home')
  mkdirSync(join(home, 'models', 'tiny-model'), { recursive: true })
  const run = (...words: string[]) =>
    lattice(['run', ...words, '--max-tokens', '1'], { env: { LATTICE_HOME: home } })
  const { stdout, stderr } = await run('tiny-model', 'hi')
  assert.equal(stdout, '[user:tiny-model hi;] w0\n')
  assert.match(stderr, /warning: .*tiny-model was read as a word .* --model tiny-model/)
  for (const words of [['tiny-model'], ['another', 'model'], ['a', 'b', '--model', 'tiny-model']]) {
    assert.doesNotMatch((await run(...words)).stderr, /was read as/)
  }
})

test('a prompt comes from stdin, behind a system message', async () => {
  const { stdout } = await lattice(['run', '--system', 'be brief', '--max-tokens', '1'], {
    stdin: 'from a pipe\n',
  })
  assert.equal(stdout, '[system:be brief;user:from a pipe;] w0\n')
})

test('an empty stdin is no prompt', async () => {
  const { code, stderr } = await lattice(['run'])
  assert.equal(code, 2)
  assert.match(stderr, /prompt on stdin is empty/)
})

test('--raw passes the prompt by the template', async () => {
  const { stdout } = await lattice(['run', '--raw', 'once', '--max-tokens', '1'])
  assert.equal(stdout, '[once] w0\n')
})

test('a model without a template says so instead of guessing one', async () => {
  const { code, stderr } = await lattice(['run', 'hi'], { env: { FAKE_TEMPLATE: 'none' } })
  assert.equal(code, 1)
  assert.match(stderr, /no chat template.*\n.*--raw/)
})

test('--json is one object with usage and timings', async () => {
  const { stdout } = await lattice(['run', 'hi', '--json', '--max-tokens', '4', '--seed', '7'])
  const result = JSON.parse(stdout)
  assert.equal(result.text, '[user:hi;] w0 w1 w2 w3')
  assert.equal(result.finish_reason, 'length')
  assert.equal(result.seed, 7)
  assert.deepEqual(result.usage, { prompt_tokens: 8, completion_tokens: 4, total_tokens: 12 })
  assert.ok(result.timings.total_ms >= result.timings.ttft_ms)
})

test('the default answer length shrinks to what the context holds', async () => {
  const { stdout } = await lattice(['run', '--raw', 'x'.repeat(97)])
  assert.match(stdout, /w2\n$/)
})

test('an answer length that was asked for is refused rather than shrunk', async () => {
  const { code, stderr } = await lattice(['run', 'hi', '--max-tokens', '1000'])
  assert.equal(code, 2)
  assert.match(stderr, /too many/)
})

test('Ctrl-C ends an answer with what there is, and exit code 130', async () => {
  const { child, says, ended } = start(['run', '--raw', 'go'], { FAKE_WORD_MS: '20' })
  child.stdin.end()
  await says('w2')
  child.kill('SIGINT')
  const { code, stdout } = await ended
  assert.equal(code, 130)
  assert.match(stdout, /^\[go\] w0 w1 w2.*\n$/)
})

test('a reader that leaves early ends the program quietly', async () => {
  const { child, says, ended } = start(['run', '--raw', 'go'])
  child.stdin.end()
  await says('w1')
  child.stdout.destroy()
  const { code, stderr } = await ended
  assert.equal(code, 0)
  assert.equal(stderr, '')
})

test('--beams samples, or takes an option of sampling without a word', async () => {
  const { code, stdout } = await lattice(['run', 'hi', '--beams', '4', '--max-tokens', '2'])
  assert.equal(code, 0)
  assert.equal(stdout, '[user:hi;] w0 w1\n')
  for (const [options, said] of [
    [['--beams', '4', '--temperature', '0.5'], /--temperature has no place/],
    [['--beams', '4', '--top-p', '0.9'], /--top-p has no place/],
    [['--beams', '4', '--stop', 'x'], /--stop has no place/],
    [['--length-penalty', '2'], /there are none/],
    [['--beams', '1'], /beams/],
  ] as const) {
    const refused = await lattice(['run', 'hi', ...options])
    assert.equal(refused.code, 2)
    assert.match(refused.stderr, said)
  }
})
