// Catches a protocol that is not the documented one: the document's vectors are read here by its
// table of offsets, with a SipHash of our own that knows the paper's vector.

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { test } from 'node:test'
import {
  VECTOR_ADDRESS,
  VECTOR_KEY,
  VECTOR_PORT,
  VECTOR_PROMPT,
  VECTOR_SECRET,
  withCurrentVectors,
} from '../../tools/protocol-vectors.ts'
import { referenceHash } from '../../test/support/siphash.ts'
import { hashOf, MESSAGE_CODES, MESSAGE_TYPES, readTokens, writeTokens } from './protocol.ts'
import { sipKey } from './siphash.ts'

const DOCUMENT = readFileSync(new URL('../../docs/protocol.md', import.meta.url), 'utf8')

function vector(name: string): DataView {
  const hex = new RegExp(`\`\`\`text\nvector ${name}\n([0-9a-f\n]+)\`\`\``).exec(DOCUMENT)?.[1]
  assert.ok(hex, `docs/protocol.md has no vector ${name}`)
  const bytes = Uint8Array.from(Buffer.from(hex.replaceAll('\n', ''), 'hex'))
  const view = new DataView(bytes.buffer)
  assert.equal(view.getUint16(0), 0x4c54)
  assert.equal(view.getUint8(2), 1)
  assert.equal(view.getUint8(3), MESSAGE_TYPES[name as keyof typeof MESSAGE_TYPES])
  assert.equal(view.getUint16(4), bytes.length - 96)
  assert.equal(view.getUint32(8), 5)
  assert.equal(view.getBigUint64(16), 0x0123456789abcdefn)
  const mac = referenceHash(VECTOR_KEY, bytes.subarray(0, 88))
  assert.equal(view.getBigUint64(88), mac, `the MAC of ${name}`)
  return view
}

const words = (view: DataView) => [56, 64, 72, 80].map((at) => view.getBigUint64(at))
const payload = (view: DataView) => new Uint8Array(view.buffer, 96)

test('SipHash is not the paper’s', () => {
  const data = Uint8Array.from({ length: 15 }, (_, i) => i)
  assert.equal(referenceHash(VECTOR_KEY, data), 0xa129ca6149be45e5n)
  const key = sipKey(VECTOR_KEY)
  for (let length = 0; length < 80; length++) {
    const bytes = Uint8Array.from({ length }, (_, i) => (i * 37 + length) & 255)
    assert.equal(hashOf(key, bytes), referenceHash(VECTOR_KEY, bytes), `${length} bytes`)
  }
})

test('the documented datagrams are not those of the code', () => {
  assert.equal(DOCUMENT, withCurrentVectors(DOCUMENT), 'run node tools/protocol-vectors.ts')
})

test('a vector does not say what the document says of it', () => {
  const hello = vector('hello')
  assert.deepEqual(
    [40, 44, 48].map((at) => hello.getUint32(at)),
    [1260, 100, 2000],
  )
  assert.equal(hello.getUint16(54), 2)
  assert.equal(hello.getUint32(32), 0)
  const first = referenceHash(VECTOR_KEY, VECTOR_PROMPT.subarray(0, 1024))
  assert.deepEqual(words(hello), [first, 0n, 0n, 0n])

  const proof = new DataView(new ArrayBuffer(36))
  proof.setUint32(0, 5)
  proof.setUint32(4, 3)
  proof.setBigUint64(8, 0x0123456789abcdefn)
  new Uint8Array(proof.buffer).set(VECTOR_ADDRESS, 16)
  proof.setUint32(32, VECTOR_PORT)
  const cookie = referenceHash(VECTOR_SECRET, new Uint8Array(proof.buffer))
  const grant = vector('grant')
  assert.equal(grant.getUint32(32), 3)
  assert.deepEqual(words(grant), [cookie, 64n, 0n, 0n])

  const data = vector('data')
  assert.equal(data.getUint16(52), 1)
  assert.deepEqual(Buffer.from(payload(data)), VECTOR_PROMPT.subarray(1200))
  const [echoed, hash, , seed] = words(data)
  assert.deepEqual([echoed, hash, seed], [cookie, referenceHash(VECTOR_KEY, payload(data)), 42n])
  assert.equal(data.getFloat32(72), 0.5)
  assert.ok(Math.abs(data.getFloat32(76) - 0.9) < 1e-6)
  for (const field of [36, 40, 44]) assert.equal(data.getUint32(field), hello.getUint32(field))

  assert.deepEqual(words(vector('ack')), [cookie, 1n, 0b101n, 64n])

  const tokens = vector('tokens')
  const said = payload(tokens)
  assert.deepEqual([...said.subarray(0, 10)], [0, 2, 0, 0, 0, 10, 0, 1, 0x11, 0x70])
  assert.equal(Buffer.from(said.subarray(10)).toString(), 'Blå')
  assert.deepEqual(words(tokens), [cookie, referenceHash(VECTOR_KEY, said), 0n, 0n])

  const end = vector('end')
  assert.equal(end.getUint16(14), MESSAGE_CODES.length)
  assert.deepEqual(words(end), [cookie, 1n, 2n, (361n << 32n) | 300n])
})

test('the documented codes are not those of the code', () => {
  const rows = DOCUMENT.matchAll(/^\| (\d+) \| `(\w+)` \|/gm)
  const documented = Object.fromEntries(rows.map(([, code, name]) => [name!, Number(code)]))
  assert.deepEqual(documented, { ...MESSAGE_CODES })
})

test('tokens do not survive the way, or too short a payload is read beyond its end', () => {
  const written = writeTokens([0, 2 ** 32 - 1], 'é')
  assert.deepEqual(readTokens(written), { tokens: Uint32Array.of(0, 2 ** 32 - 1), text: 'é' })
  assert.equal(readTokens(written.subarray(0, 9)), undefined)
  assert.equal(readTokens(new Uint8Array(1)), undefined)
})
