// Catches a program that is slow to help, vague about what is wrong, or wrong in its exit codes.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { ERROR_CODES } from '../../src/errors.ts'
import { lattice } from './lattice.ts'

const usageErrors: [args: string[], what: RegExp, todo: RegExp][] = [
  [['srve'], /unknown command 'srve'/, /Did you mean serve\?/],
  [['serve', '--prot', '1'], /unknown option '--prot'/, /Did you mean --port\?/],
  [['serve', '--port', '65536'], /whole number from 0 to 65535/, /--help/],
  [['serve', '--kv-memory', '3Q'], /512M, 32K or 1\.5GiB/, /--help/],
  [['serve', '--api-key', ''], /API key is empty/, /LATTICE_API_KEY/],
  [['run', '--raw', '--system', 'x', 'hi'], /--raw uses no chat template/, /leave one/],
  [['ps', 'extra'], /too many arguments/, /--help/],
  [['serve', 'model.gguf'], /too many arguments/, /--model/],
]
for (const [args, what, todo] of usageErrors) {
  test(`wrong usage is refused with what to do: lattice ${args.join(' ')}`, async () => {
    const { code, stdout, stderr } = await lattice(args, { stdin: 'x' })
    assert.equal(code, 2)
    assert.equal(stdout, '')
    assert.match(stderr, what)
    assert.match(stderr, todo)
    assert.match(stderr, /^error: [^\n]+\n {2}→ [^\n]+\n$/)
  })
}

test('no command at all prints the help as wrong usage', async () => {
  const { code, stderr } = await lattice([])
  assert.equal(code, 2)
  assert.match(stderr, /Usage: lattice COMMAND/)
})

test('an error of the engine keeps its exit code and shows a stack only on request', async () => {
  const args = ['run', '--model', 'nowhere', 'hi']
  const plain = await lattice(args)
  assert.equal(plain.code, ERROR_CODES.model_not_found.exit)
  assert.equal(plain.stderr, 'error: There is no model nowhere.\n  → Pull one.\n')
  const debug = await lattice(args, { env: { LATTICE_DEBUG: '1' } })
  assert.match(debug.stderr, /\n {4}at /)
})

test('colours stay out of what is no terminal', async () => {
  const { stderr } = await lattice(['srve'])
  assert.ok(!stderr.includes('\x1b'))
})

test('inspect errors --json is the registry itself', async () => {
  const { code, stdout } = await lattice(['inspect', 'errors', '--json'])
  assert.equal(code, 0)
  assert.deepEqual(JSON.parse(stdout), ERROR_CODES)
})
