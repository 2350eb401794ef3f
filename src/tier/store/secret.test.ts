// Catches a key that is too short, that others can read, or that is not found, being used.

import assert from 'node:assert/strict'
import { chmodSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { temporaryDirectory } from '../../../test/support/temporary.ts'
import { errnoName } from '../../ffi/libc.ts'
import { addressOf, lastErrno, SYS, syscall } from '../../ffi/syscalls.ts'
import { readSecret } from './secret.ts'

test('a bad key file is taken', () => {
  const path = join(temporaryDirectory('key'), 'key')
  const refused = (message: RegExp) =>
    assert.throws(() => readSecret(path), { code: 'usage', message })
  refused(/cannot be read/)
  writeFileSync(path, new Uint8Array(31), { mode: 0o600 })
  refused(/31 bytes/)
  writeFileSync(path, new Uint8Array(32).fill(3))
  assert.deepEqual(
    [...readSecret(path)],
    Array.from({ length: 32 }, () => 3),
  )
  chmodSync(path, 0o640)
  refused(/Others than its owner/)
})

test('a key that the keyring has not is made up', () => {
  const source = `keyring:lattice-test-${process.pid}-${Date.now()}`
  assert.throws(() => readSecret(source), { code: 'usage', message: /keyring gives no key/ })
})

test('a key of the keyring is not found, or read wrongly', (t) => {
  const name = `lattice-test-${process.pid}`
  const type = Buffer.from('user'.padEnd(128, '\0'))
  const description = Buffer.from(name.padEnd(128, '\0'))
  const payload = new Uint8Array(128).fill(9)
  const processKeyring = -2
  const key = syscall(
    SYS.addKey,
    addressOf(type),
    addressOf(description),
    addressOf(payload),
    40,
    processKeyring,
  )
  if (key < 0) return t.skip(`this machine lets nobody add keys: ${errnoName(lastErrno())}`)
  assert.deepEqual(
    [...readSecret(`keyring:${name}`)],
    Array.from({ length: 40 }, () => 9),
  )
})
