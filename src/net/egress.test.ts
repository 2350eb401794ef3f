// Holds the egress program to what it counts, marks and delays.

import assert from 'node:assert/strict'
import { after, test } from 'node:test'
import {
  frame,
  type FrameShape,
  onesComplement,
  udpChecksum,
  udpOffset,
} from '../../test/support/packets.ts'
import { DSCP_OF_PRIORITY, Egress } from './egress.ts'
import {
  HEADER_BYTES,
  type Header,
  MESSAGE_CODES,
  MESSAGE_TYPES,
  writeHeader,
  writeTokens,
} from './protocol.ts'
import { sipKey } from './siphash.ts'

const skip = process.getuid?.() === 0 ? false : 'SKIPPED: loading BPF programs needs root'
const [NEXT, DROP] = [-1, 2]
const TENANT = 5
const EMPTY = new Uint8Array()
const KEY = sipKey(new Uint8Array(16))
/** In struct __sk_buff. */
const TSTAMP = 152

const opened: Egress[] = []
after(() => opened.forEach((egress) => egress.close()))

function open(): Egress {
  const egress = Egress.load()
  opened.push(egress)
  return egress
}

function datagram(change: Partial<Header>, payload: Uint8Array = EMPTY) {
  const bytes = new Uint8Array(HEADER_BYTES + payload.length)
  bytes.set(payload, HEADER_BYTES)
  const header = { tenant: TENANT, request: 9n, payloadBytes: payload.length, ...change }
  writeHeader(new DataView(bytes.buffer), header, KEY)
  return bytes
}

function tokens(number: number, first: number, count: number) {
  const ids = Array.from({ length: count }, (_, i) => i)
  const words: Header['words'] = [1n, 2n, BigInt(number), BigInt(first)]
  return datagram({ type: MESSAGE_TYPES.tokens, words }, writeTokens(ids, 'text'))
}

function end(number: number, outputTokens: number) {
  const words: Header['words'] = [1n, BigInt(number), BigInt(outputTokens), 0n]
  return datagram({ type: MESSAGE_TYPES.end, code: MESSAGE_CODES.length, words })
}

const OUT: FrameShape = { fromPort: 7411, toPort: 40_000 }

test('tokens are counted twice when they are repeated, or not for who sent them', { skip }, () => {
  const egress = open()
  let bytes = 0
  const send = (payload: Uint8Array, shape: FrameShape = {}) => {
    const packet = frame(payload, { ...OUT, ...shape })
    bytes += packet.length
    const run = egress.program.testRun(packet)
    assert.equal(run.action, NEXT)
    assert.deepEqual(run.packet, packet, 'a frame without a class is changed')
  }
  send(datagram({ type: MESSAGE_TYPES.ack }))
  send(tokens(0, 0, 3))
  send(tokens(2, 5, 4), { vlans: 2 })
  send(tokens(1, 3, 2), { ip: 6 })
  send(tokens(1, 3, 2), { options: 40 })
  send(end(3, 9))
  send(end(3, 9))
  // 1 came late, then again; END again. What a gap hides is counted with what is behind it.
  const account = { datagrams: 7, bytes, tokens: 9, repeats: 3 }
  assert.deepEqual(egress.tenant(TENANT), { ...account, ended: 1, overdue: 0 })
  const code = MESSAGE_CODES.length
  assert.deepEqual(egress.request(TENANT, 9n), { ...account, ended: true, code })
  assert.equal(egress.request(TENANT, 10n), undefined)
  assert.equal(egress.request(TENANT + 1, 9n), undefined)
  assert.equal(egress.tenant(TENANT + 1).datagrams, 0)
})

test('a class is not marked, or its marking breaks a frame', { skip }, () => {
  const egress = open()
  const shapes: FrameShape[] = [{}, { vlans: 1 }, { options: 40 }, { ip: 6 }, { ip: 6, vlans: 2 }]
  for (const priority of [0, 1, 2, 3] as const) {
    egress.setTenant(TENANT, { priority, bytesPerSecond: 0 })
    for (const shape of shapes) {
      const packet = frame(tokens(0, 0, 2), { ...OUT, ...shape })
      const ip = 14 + 4 * (shape.vlans ?? 0)
      if (shape.ip !== 6) {
        // Congestion was seen (RFC 3168), which must stay.
        packet[ip + 1] = 3
        packet.set([0, 0], ip + 10)
        const sum = onesComplement(packet.subarray(ip, ip + 20 + (shape.options ?? 0)))
        packet.set([sum >> 8, sum & 255], ip + 10)
      }
      const { action, packet: out } = egress.program.testRun(packet)
      assert.equal(action, NEXT)
      const dscp = DSCP_OF_PRIORITY[priority]
      const view = new DataView(out.buffer)
      if (shape.ip === 6) assert.equal(view.getUint16(ip), 0x6000 | (dscp << 6))
      else {
        assert.equal(out[ip + 1], (dscp << 2) | 3)
        assert.equal(onesComplement(out.subarray(ip, ip + 20 + (shape.options ?? 0))), 0)
      }
      assert.equal(udpChecksum(out, { ...OUT, ...shape }), udpChecksum(packet, shape))
      const from = udpOffset(shape)
      assert.deepEqual(out.subarray(from), packet.subarray(from), 'more than the class is changed')
    }
  }
})

test('a tenant without a class is marked', { skip }, () => {
  const egress = open()
  egress.setTenant(TENANT, { priority: undefined, bytesPerSecond: 1e9 })
  const packet = frame(tokens(0, 0, 2), OUT)
  assert.deepEqual(egress.program.testRun(packet).packet, packet)
})

test('a paced tenant sends faster than its pace, or hurries others', { skip }, () => {
  const egress = open()
  egress.setTenant(TENANT, { priority: 0, bytesPerSecond: 10_000 })
  const packet = frame(tokens(0, 0, 2), OUT)
  const gapNs = BigInt(Math.round((packet.length / 10_000) * 1e9))
  const before = process.hrtime.bigint()
  const times: bigint[] = []
  for (let i = 0; ; i++) {
    const { action, context } = egress.program.testRun(packet)
    if (action === DROP) break
    times.push(context.getBigUint64(TSTAMP, true))
    assert.ok(i < 1000, 'nothing is ever dropped')
  }
  assert.ok(times[0]! >= before, 'the first is dated back')
  for (let i = 1; i < times.length; i++) {
    const off = times[i]! - times[i - 1]! - gapNs
    assert.ok(off > -1000n && off < 1000n, `frame ${i} is ${off} ns off its pace`)
  }
  // As many as fit in the horizon of 2 s; the clock runs on meanwhile.
  assert.ok(times.length >= 2e9 / Number(gapNs), `${times.length} frames`)
  assert.equal(egress.tenant(TENANT).overdue, 1)
  assert.equal(egress.tenant(TENANT).datagrams, times.length)
  // An acknowledgement is never held back: the prompt would stall.
  const ack = egress.program.testRun(frame(datagram({ type: MESSAGE_TYPES.ack }), OUT))
  assert.equal(ack.context.getBigUint64(TSTAMP, true), 0n)
  const other = datagram({ type: MESSAGE_TYPES.tokens, tenant: TENANT + 1 }, writeTokens([], ''))
  const free = egress.program.testRun(frame(other, OUT))
  assert.equal(free.context.getBigUint64(TSTAMP, true), 0n)
})

test('what is not an answer is counted, or a short frame is read beyond its end', { skip }, () => {
  const egress = open()
  egress.setTenant(TENANT, { priority: 0, bytesPerSecond: 0 })
  const answer = tokens(0, 0, 2)
  const others: [Uint8Array, FrameShape][] = [
    [answer, { ...OUT, fromPort: 7412 }],
    [answer, { ...OUT, protocol: 6 }],
    [answer, { ...OUT, fragment: 0x2000 }],
    [datagram({ type: MESSAGE_TYPES.grant }), OUT],
    [datagram({ type: MESSAGE_TYPES.tokens, tenant: 1024 }), OUT],
    [datagram({ type: MESSAGE_TYPES.tokens, version: 2 }), OUT],
  ]
  for (const [payload, shape] of others) {
    const packet = frame(payload, shape)
    const { action, packet: out } = egress.program.testRun(packet)
    assert.equal(action, NEXT)
    assert.deepEqual(out, packet)
  }
  const whole = frame(answer, OUT)
  // The kernel runs no frame that is shorter than its IP header.
  for (let length = 14 + 20; length < 14 + 20 + 8 + HEADER_BYTES; length++) {
    assert.equal(egress.program.testRun(whole.slice(0, length)).action, NEXT)
  }
  assert.equal(egress.tenant(TENANT).datagrams, 0)
})

test('a tenant is paced where nothing would hold its frames back', { skip }, () => {
  const egress = open()
  egress.setTenant(TENANT, { priority: 0, bytesPerSecond: 1000 })
  assert.throws(() => egress.attach('lo'), { code: 'net_refused', message: /holds frames back/ })
  assert.throws(() => egress.setTenant(TENANT, { priority: 0, bytesPerSecond: 1 }), /a second/)
  assert.throws(() => egress.setTenant(1024, { priority: 0, bytesPerSecond: 0 }), /not one of/)
})
