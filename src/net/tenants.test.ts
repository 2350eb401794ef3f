// Catches a tenants' file that is believed although it is wrong, and a key that is printed.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { LatticeError } from '../errors.ts'
import { parseKey, parseTenants, readTenants } from './tenants.ts'

const HEX = '000102030405060708090a0b0c0d0e0f'
const BYTES = Uint8Array.from({ length: 16 }, (_, i) => i)
const TENANT = {
  tenant: 1,
  name: 'search',
  keys: [HEX],
  tokens_per_second: 1000,
  burst_tokens: 50_000,
  max_running: 8,
}

test('comments or commas break the file, or are taken out of strings', () => {
  const text = `[ // the first
    { "tenant": 1, "name": "a", /* once "b" */ "keys": ["${HEX}",],
      "tokens_per_second": 10, "burst_tokens": 1, "max_running": 1, },
  ]`
  const [tenant] = parseTenants(text, 'f')
  assert.deepEqual(tenant, {
    index: 1,
    name: 'a',
    keys: [BYTES, BYTES],
    tokensPerSecond: 10,
    burstTokens: 1,
    maxRunning: 1,
  })
  assert.throws(() => parseTenants('[{"name": "//, ]"}]', 'f'), /"name" of/)
})

test('how answers are marked and paced is dropped, or made up', () => {
  const egress = (change: object) =>
    parseTenants(JSON.stringify([{ ...TENANT, ...change }]), 'f')[0]?.egress
  assert.equal(egress({}), undefined)
  assert.deepEqual(egress({ priority: 0 }), { priority: 0, bytesPerSecond: 0 })
  assert.deepEqual(egress({ bytes_per_second: 1000 }), {
    priority: undefined,
    bytesPerSecond: 1000,
  })
  assert.deepEqual(egress({ priority: 3, bytes_per_second: 1e11 }), {
    priority: 3,
    bytesPerSecond: 1e11,
  })
})

test('a key is read in one way and not in the other, or in a third', () => {
  const base64 = Buffer.from(BYTES).toString('base64')
  for (const text of [HEX, HEX.toUpperCase(), base64, base64.replace('==', '')]) {
    assert.deepEqual(parseKey(text), BYTES)
  }
  for (const text of ['', HEX.slice(1), `${HEX}0`, `${base64}=`, 'x'.repeat(32), 5, undefined]) {
    assert.equal(parseKey(text), undefined)
  }
})

test('what is wrong is taken, or said without where', () => {
  const wrong: [unknown, RegExp][] = [
    [{}, /no list/],
    [[], /no tenant/],
    [[5], /tenant 1 of the list is no object/],
    [[{ ...TENANT, colour: 1 }], /unknown field "colour"/],
    [[{ ...TENANT, tenant: 1024 }], /"tenant" .* 0 to 1023/],
    [[{ ...TENANT, tenant: '1' }], /"tenant"/],
    [[{ ...TENANT, name: 'a b' }], /"name" of tenant 1/],
    [[{ ...TENANT, keys: [] }], /one or two keys/],
    [[{ ...TENANT, keys: [HEX, HEX, HEX] }], /one or two keys/],
    [[{ ...TENANT, tokens_per_second: 9 }], /"tokens_per_second" .* 10 to/],
    [[{ ...TENANT, burst_tokens: 0 }], /"burst_tokens"/],
    [[{ ...TENANT, max_running: 1.5 }], /"max_running"/],
    [[{ ...TENANT, priority: 4 }], /"priority" .* 0 to 3/],
    [[{ ...TENANT, priority: null }], /"priority"/],
    [[{ ...TENANT, bytes_per_second: 999 }], /"bytes_per_second" .* 1000 to/],
    [[TENANT, { ...TENANT, name: 'other' }], /the index 1/],
    [[TENANT, { ...TENANT, tenant: 2 }], /the name search/],
  ]
  for (const [value, message] of wrong) {
    assert.throws(() => parseTenants(JSON.stringify(value), 'f'), { code: 'usage', message })
  }
  assert.throws(() => readTenants('nowhere.json'), { code: 'usage', message: /nowhere.json/ })
})

test('a message shows a key', () => {
  const secret = 'dead beef dead beef'
  const texts = [
    JSON.stringify([{ ...TENANT, keys: [secret] }]),
    JSON.stringify([{ ...TENANT, keys: secret }]),
    `[{"keys": ["${secret}" "x"]}]`,
  ]
  for (const text of texts) {
    assert.throws(
      () => parseTenants(text, 'f'),
      (thrown: LatticeError) => {
        const said = `${thrown.message} ${thrown.todo} ${String(thrown.cause)}`
        return thrown.code === 'usage' && !said.includes('beef')
      },
    )
  }
})
