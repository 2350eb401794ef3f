// Catches flags of the datagram path that are taken in silence where they mean nothing.

import assert from 'node:assert/strict'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { temporaryDirectory } from '../support/temporary.ts'
import { lattice } from './lattice.ts'

const KEY = '00112233445566778899aabbccddeeff'

test('a flag of the datagram path means nothing, and nobody says so', async () => {
  const refused: [string[], RegExp][] = [
    [['--net', 'eth9'], /--net needs to know who may ask.\n.*--net-tenants/],
    [['--net-mode', 'generic'], /--net-mode has no effect without --net/],
    [['--net-tenants', 'nowhere.jsonc'], /nowhere.jsonc cannot be read/],
    [['--net-queue', '-1'], /whole number/],
    [['--net-share', 'socket'], /--net-share needs to know who may ask.\n.*--net-tenants/],
    [['--net-join', 'nowhere', '--net', 'eth9'], /--net is for who owns an interface/],
    [['--net-join', 'nowhere', '--net-sample', '8'], /--net-sample is for who owns/],
    [['--net-sample', '12'], /a power of two/],
    [['--net-mode', 'fast'], /Allowed choices are native, zerocopy, generic/],
  ]
  for (const [flags, message] of refused) {
    const { code, stderr, stdout } = await lattice(['serve', '--port', '0', ...flags])
    assert.equal(code, 2, stderr)
    assert.match(stderr, message)
    assert.equal(stdout, '', 'it says so after the model was loaded')
  }
})

test('that nobody shares a socket is said after the model was loaded', async () => {
  const { code, stderr, stdout } = await lattice(['serve', '--port', '0', '--net-join', 'nowhere'])
  assert.equal(code, 1)
  assert.match(stderr, /no socket at nowhere.\n.*--net-share/)
  assert.equal(stdout, '')
})

test('a wrong tenants’ file is believed, or its key printed', async () => {
  const file = join(temporaryDirectory('net'), 'tenants.jsonc')
  writeFileSync(file, JSON.stringify([{ tenant: 1, name: 'a', keys: [`${KEY}00`] }]))
  const { code, stderr } = await lattice(['serve', '--port', '0', '--net-tenants', file])
  assert.equal(code, 2)
  assert.match(stderr, /key 0 of tenant 1 of the list is not 16 bytes in hex or base64/)
  assert.ok(!stderr.includes(KEY))
})

test('run --server guesses who asks, or takes what has no effect', async () => {
  const empty = join(temporaryDirectory('net'), 'key')
  writeFileSync(empty, 'no key')
  const server = ['--server', 'lattice://127.0.0.1:9']
  const refused: [string[], RegExp, object?][] = [
    [['--server', 'http://127.0.0.1'], /no address of the datagram protocol/],
    [['--server', 'lattice://h:0'], /no address of the datagram protocol/],
    [server, /which tenant asks/],
    [[...server, '--tenant', '1'], /needs the tenant’s key.\n.*LATTICE_TENANT_KEY/],
    [[...server, '--tenant', '1', '--tenant-key-file', empty], /not 16 bytes/],
    [[...server, '--tenant', '1', '--tenant-key-file', `${empty}x`], /cannot be read/],
    [[...server, '--threads', '2'], /--threads has no effect with --server/],
    [[...server, '--top-k', '2'], /--top-k has no effect with --server/],
  ]
  for (const [flags, message] of refused) {
    const { code, stderr } = await lattice(['run', 'hi', ...flags])
    assert.equal(code, 2, stderr)
    assert.match(stderr, message)
  }
  const env = { LATTICE_TENANT: '1', LATTICE_TENANT_KEY: KEY }
  const { code, stderr } = await lattice(['run', 'hi', ...server], { env })
  assert.equal(code, 1)
  assert.match(stderr, /Nothing takes datagrams|does not answer/)
})
