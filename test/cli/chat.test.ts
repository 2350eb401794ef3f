// Catches a chat that forgets what was said, sends its own commands to the model, or dies of an
// error that the next message could do without.

import assert from 'node:assert/strict'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { lattice, start } from './lattice.ts'

const ONE = ['chat', '--max-tokens', '1']

test('each message carries the conversation before it', async () => {
  const { code, stdout } = await lattice(ONE, { stdin: 'a\nb\n' })
  assert.equal(code, 0)
  assert.equal(stdout, '[user:a;] w0\n\n[user:a;assistant:[user:a;] w0;user:b;] w0\n\n')
})

test('/clear forgets the conversation but keeps the system message', async () => {
  const { stdout } = await lattice([...ONE, '--system', 's'], { stdin: 'a\n/clear\nb\n' })
  assert.equal(stdout, '[system:s;user:a;] w0\n\n[system:s;user:b;] w0\n\n')
})

test('/system replaces the system message', async () => {
  const { stdout } = await lattice([...ONE, '--system', 's'], { stdin: '/system t u\na\n' })
  assert.equal(stdout, '[system:t u;user:a;] w0\n\n')
})

test('""" joins lines into one message, slashes included', async () => {
  const { stdout } = await lattice(ONE, { stdin: '"""/a\n\nb\n"""\n' })
  assert.equal(stdout, '[user:/a\n\nb;] w0\n\n')
})

test('an unknown command is refused, a leading space sends it', async () => {
  const { stdout, stderr } = await lattice(ONE, { stdin: '/clera\n /clera\n' })
  assert.match(stderr, /no command \/clera/)
  assert.equal(stdout, '[user:/clera;] w0\n\n')
})

test('a message that does not fit leaves the conversation as it was', async () => {
  const { code, stdout, stderr } = await lattice(ONE, {
    stdin: `${'x'.repeat(200)}\na\n/exit\nb\n`,
  })
  assert.equal(code, 0)
  assert.match(stderr, /too many/)
  assert.match(stderr, /\/clear/)
  assert.equal(stdout, '[user:a;] w0\n\n')
})

test('/save writes the messages and replaces no file', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'lattice-'))
  t.after(() => rmSync(folder, { recursive: true }))
  const file = join(folder, 'talk.json')
  const { stderr } = await lattice(ONE, { stdin: `a\n/save ${file}\n/save ${file}\n` })
  assert.deepEqual(JSON.parse(readFileSync(file, 'utf8')), {
    model: 'fake',
    messages: [
      { role: 'user', content: 'a' },
      { role: 'assistant', content: '[user:a;] w0' },
    ],
  })
  assert.match(stderr, /not written/)
})

test('Ctrl-C stops the answer, not the program', async () => {
  const { child, says, ended } = start(['chat'], { FAKE_WORD_MS: '20' })
  child.stdin.write('a\n')
  await says('w2')
  child.kill('SIGINT')
  await says('(stopped)')
  child.stdin.end('/system still here\n/system\n')
  const { code, stderr } = await ended
  assert.equal(code, 0)
  assert.match(stderr, /still here\n$/)
})
