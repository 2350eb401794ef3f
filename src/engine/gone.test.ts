// Catches a request that goes on after its client went, and one that ends because of another's end.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { connectionKey } from '../net/connection-key.ts'
import { GoneClients } from './gone.ts'

type Record = [address: string, port: number, ktimeNs: bigint]

/** What the kernel has written, and who was aborted for it. */
function world() {
  const records: DataView[] = []
  const gone = new GoneClients((take) => {
    for (const view of records.splice(0)) take(view, 8, view.byteLength - 8)
  })
  return {
    gone,
    ended(...ends: Record[]): number[] {
      records.push(...ends.map(record))
      const aborted: number[] = []
      gone.look((id) => void aborted.push(id))
      return aborted
    },
  }
}

/** Behind 8 bytes of something else: a record lies anywhere in the ring. */
function record([address, port, ktimeNs]: Record): DataView {
  const view = new DataView(new ArrayBuffer(48))
  view.setBigUint64(8, ktimeNs, true)
  if (address.includes(':')) {
    const hex = connectionKey(address, 0).split(':')[0]!
    new Uint8Array(view.buffer).set(Buffer.from(hex, 'hex'), 16)
    view.setUint16(36, 1, true)
  } else new Uint8Array(view.buffer).set(address.split('.').map(Number), 32)
  view.setUint16(38, port, true)
  return view
}

const by = (address: string, port: number, sinceNs = 100n) => ({
  key: connectionKey(address, port),
  sinceNs,
})

test('a connection has two names', () => {
  const key = connectionKey('127.0.0.1', 4711)
  assert.equal(key, `${'0'.repeat(20)}ffff7f000001:4711`)
  assert.equal(connectionKey('::ffff:127.0.0.1', 4711), key)
  assert.equal(connectionKey('fe80::1%eth0', 1), `fe80${'0'.repeat(27)}1:1`)
  assert.notEqual(connectionKey('::1', 4711), connectionKey('::1', 4712))
})

test('another’s sequences are aborted, or not all of one', () => {
  const { gone, ended } = world()
  gone.submitted([1, 2], by('10.0.0.1', 80))
  gone.submitted([3], by('10.0.0.2', 80))
  gone.submitted([4], by('2001:db8::1', 80))
  gone.submitted([5], undefined)
  gone.forked(2, 6)
  gone.finished(1)
  assert.deepEqual(ended(['10.0.0.1', 81, 200n], ['10.0.0.3', 80, 200n]), [])
  assert.deepEqual(ended(['10.0.0.1', 80, 200n]), [2, 6])
  assert.deepEqual(ended(['2001:db8::1', 80, 200n]), [4])
  for (const id of [2, 4, 6]) gone.finished(id)
  assert.deepEqual(ended(['10.0.0.2', 80, 200n]), [3])
})

test('the end of an earlier connection ends the next one’s request', () => {
  const { gone, ended } = world()
  gone.submitted([1], by('10.0.0.1', 80, 300n))
  assert.deepEqual(ended(['10.0.0.1', 80, 299n]), [])
  gone.submitted([2], by('10.0.0.1', 80, 300n))
  assert.deepEqual(ended(), [], 'it is remembered as if it were later')
  assert.deepEqual(ended(['10.0.0.1', 80, 300n]), [1, 2])
})

test('a client that went before its prompt was there is waited for', () => {
  const { gone, ended } = world()
  assert.deepEqual(ended(['10.0.0.1', 80, 200n]), [])
  gone.submitted([1], by('10.0.0.1', 80, 150n))
  gone.submitted([2], by('10.0.0.1', 80, 250n))
  assert.deepEqual(ended(), [1])
  gone.finished(1)
  // So many ends later nobody remembers; then Node says it.
  ended(...Array.from({ length: 5000 }, (_, i): Record => ['10.0.0.9', i, 300n]))
  gone.submitted([3], by('10.0.0.1', 80, 150n))
  assert.deepEqual(ended(), [])
})
