// Catches counts of the datagram path that are hidden, or shown where they do not belong.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { DatagramStatus } from '../net/datagram-server.ts'
import { attachedLines, netPage } from './net-page.ts'

const SENT = { datagrams: 9, bytes: 5000, tokens: 300, repeats: 2, ended: 1, overdue: 0 }
const TENANT = { index: 7, name: 'seven', running: 1, granted: 4, rejected: 5, chargedTokens: 600 }
const STATUS: DatagramStatus = {
  interface: 'eth1',
  attached: { mode: 'native', id: 71, name: 'ingress' },
  zeroCopy: false,
  ring: { ring: 'native' },
  queues: [0, 1],
  port: 7411,
  addresses: 2,
  isPair: false,
  verified: 10_000,
  running: 1,
  counters: { passed: 3, hello: 10, granted: 4, repeated: 1, rejected: 5, rate: 2, model: 3 },
  losses: { received: 0, sent: 0 },
  tenants: [{ ...TENANT, sent: SENT }],
  replicas: [
    { index: 0, model: 'tiny', process: 0, ready: true, running: 1, others: 2, prefixes: 12 },
  ],
  events: { every: 0, count: 0 },
  failure: undefined,
}

test('what a count is part of cannot be seen, or one that is none is shown', () => {
  assert.equal(
    netPage(STATUS),
    `Datagrams on eth1, UDP port 7411: native XDP (program 71), AF_XDP copy, native ring, 2 queues
1 running

PACKETS     COUNT
passed          3
hello          10
  granted       4
  repeated      1
  rejected      5
    model       3
    rate        2
forwarded       0

TENANT  NUMBER  RUNNING  GRANTED  REJECTED  CHARGED  TOKENS  BYTES  REPEATS
seven        7        1        4         5      600     300   5000        2

REPLICA  PROCESS  RUNNING  OTHERS  PREFIXES  READY
tiny     own            1       2        12  yes`,
  )
})

test('what goes wrong is not shown', () => {
  const counters = { ...STATUS.counters, bad_mac: 8, syn: 30, syn_source: 20 }
  const sent = { ...SENT, overdue: 6 }
  const page = netPage({
    ...STATUS,
    attached: undefined,
    addresses: 0,
    counters,
    losses: { received: 4, sent: 0 },
    tenants: [{ ...TENANT, sent }],
    syn: { port: 8080, source: { perSecond: 20, burst: 100 }, total: { perSecond: 0.5, burst: 1 } },
    ring: { ring: 'typescript', why: 'no such file' },
    failure: 'The ring thread has ended.',
  })
  assert.match(page, /AF_XDP copy, ring in TypeScript, 2 queues$/m)
  assert.match(page, /^The native ring cannot be loaded: no such file$/m)
  assert.match(page, /NOT ATTACHED/)
  assert.match(page, /^It answers for any address/m)
  assert.match(page, /^FAILED: The ring thread has ended\.$/m)
  assert.match(page, /^1 running · lost frames: 4 received, 0 sent$/m)
  assert.match(page, /TCP port 8080: 20 a second of one source, 100 at once; 0.5 a second of all/)
  assert.match(page, /^bad_mac +8\nsyn +30\n {2}syn_source +20$/m)
  assert.match(page, /OVERDUE\n.* 6$/m)
})

test('rates are of another time than between two looks', () => {
  const counters = { ...STATUS.counters, hello: 4, rate: 1 }
  const tenants = [{ ...TENANT, sent: { ...SENT, tokens: 100 } }]
  const page = netPage(STATUS, { before: { ...STATUS, counters, tenants }, seconds: 2 })
  assert.match(page, /^hello +10 +3$/m)
  assert.match(page, /^ {4}rate +2 +1$/m)
  assert.match(page, /TOKENS\/S\nseven .* 100$/m)
})

test('an end of a veth pair is attached without a word of the other end', () => {
  assert.match(attachedLines({ ...STATUS, isPair: true }), /ip link set dev PEER xdp object \//)
  assert.ok(!attachedLines(STATUS).includes('PEER'))
  const generic = { mode: 'generic' as const, id: 1, name: '' }
  assert.ok(!attachedLines({ ...STATUS, isPair: true, attached: generic }).includes('PEER'))
})
