// Catches a server that cannot be stopped or stops too soon, a port that is taken in silence, and
// a curl line that does not work when pasted.

import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { test } from 'node:test'
import { lattice, start } from './lattice.ts'

const SERVE = ['serve', '--port', '0']

test('SIGTERM drains, then exits 0', async () => {
  const { child, says, ended } = start(SERVE, { FAKE_DRAIN_MS: '200' })
  await says('ready in')
  const asked = performance.now()
  child.kill('SIGTERM')
  const { code, stdout } = await ended
  assert.equal(code, 0)
  assert.ok(performance.now() - asked >= 200, 'it did not wait for the drain')
  assert.match(stdout, /^fake engine, 1 thread\nServing fake on http:\/\/127\.0\.0\.1:\d+/)
})

test('a flag does not reach the engine, or another one does', async () => {
  const asked = async (...flags: string[]): Promise<Record<string, unknown>> => {
    const { child, says, ended } = start([...SERVE, ...flags], { FAKE_ECHO: '1' })
    await says('ready in')
    child.kill('SIGTERM')
    return JSON.parse((await ended).stdout.split('\n')[0]!) as Record<string, unknown>
  }
  assert.deepEqual(await asked(), {
    modelId: 'fake',
    device: 'auto',
    prefixCacheOutput: false,
    maxSequences: 64,
    maxQueue: 512,
  })
  const flags = ['--prefix-cache', '1M', '--prefix-eviction', 'lru', '--prefix-cache-output', 'on']
  const all = await asked(...flags, '--kv-memory', '2M', '--threads', '1', '--context', '64')
  const { prefixCacheBytes, prefixEviction, prefixCacheOutput } = all
  assert.deepEqual([prefixCacheBytes, prefixEviction, prefixCacheOutput], [1 << 20, 'lru', true])
  assert.deepEqual([all['kvMemoryBytes'], all['threads'], all['contextLength']], [2 << 20, 1, 64])
})

test('one Ctrl-C that arrives three times still drains', async () => {
  const { child, says, ended } = start(SERVE, { FAKE_DRAIN_MS: '800' })
  await says('ready in')
  for (let i = 0; i < 3; i++) {
    child.kill('SIGINT')
    await sleep(30)
  }
  assert.equal((await ended).code, 0)
})

test('a second Ctrl-C ends a drain that takes too long', async () => {
  const { child, says, ended } = start(SERVE, { FAKE_DRAIN_MS: '60000' })
  await says('ready in')
  child.kill('SIGINT')
  await says('Draining')
  await sleep(700)
  child.kill('SIGINT')
  assert.equal((await ended).code, 130)
})

test('a port in use is said before the model is loaded', async (t) => {
  const other = createServer()
  await new Promise<void>((resolve) => other.listen(0, '127.0.0.1', resolve))
  t.after(() => other.close())
  const { port } = other.address() as AddressInfo
  const { code, stdout, stderr } = await lattice(['serve', '--port', String(port)])
  assert.equal(code, 2)
  assert.equal(stdout, '')
  assert.match(stderr, new RegExp(`Port ${port} on 127.0.0.1 is in use.\n.*--port`))
})

test('an address that is not ours is refused with what to do', async () => {
  const { code, stderr } = await lattice([...SERVE, '--host', '192.0.2.1'])
  assert.equal(code, 2)
  assert.match(stderr, /192\.0\.2\.1 is no address of this machine/)
})

test('an empty LATTICE_API_KEY is refused: it would let everyone in', async () => {
  const { code, stderr } = await lattice(SERVE, { env: { LATTICE_API_KEY: '' } })
  assert.equal(code, 2)
  assert.match(stderr, /API key is empty/)
})

test('every network without a key is warned of', async () => {
  const { child, says, ended } = start([...SERVE, '--host', '0.0.0.0'])
  await says('anyone who reaches 0.0.0.0')
  await says('curl')
  child.kill('SIGTERM')
  assert.match((await ended).stdout, /curl -N http:\/\/127\.0\.0\.1:/)
})

test('the curl line is a valid request for a shell', async (t) => {
  const { child, says, ended } = start([...SERVE, '--model', "it's"])
  t.after(() => child.kill('SIGKILL'))
  await says('stream')
  child.kill('SIGTERM')
  const line = /^ {2}curl (.*)$/m.exec((await ended).stdout)?.[1]
  assert.ok(line)
  // The shell takes the line apart; the last word is the body.
  const words = execFileSync('sh', ['-c', `printf '%s\\n' ${line}`], { encoding: 'utf8' })
  const [, url, , header, , body] = words.split('\n')
  assert.match(url ?? '', /\/v1\/chat\/completions$/)
  assert.equal(header, 'content-type: application/json')
  const request = JSON.parse(body ?? '')
  assert.equal(request.model, "it's")
  assert.equal(request.messages[0].role, 'user')
})
