// Holds the admission of plain connections to its limits, a SYN in and a verdict out.

import assert from 'node:assert/strict'
import { after, test } from 'node:test'
import { frame, type FrameShape, udpOffset } from '../../test/support/packets.ts'
import { Ingress, type SynLimits } from './ingress.ts'

const skip = process.getuid?.() === 0 ? false : 'SKIPPED: loading BPF programs needs root'
const [DROP, PASS] = [1, 2]
const PORT = 8080
const [SYN, ACK] = [2, 16]
/** So few that none comes back while a test runs. */
const SLOW = { perSecond: 0.01, burst: 5 }

const opened: Ingress[] = []
after(() => opened.forEach((ingress) => ingress.close()))

function open(syn: Partial<SynLimits> | undefined): Ingress {
  const limits = syn && { port: PORT, source: undefined, total: undefined, ...syn }
  const ingress = Ingress.load({ syn: limits })
  opened.push(ingress)
  return ingress
}

/** A TCP segment without data: the support's frames with a TCP header in place of UDP's. */
function segment(flags: number, shape: FrameShape = {}, port = PORT): Uint8Array {
  const bytes = frame(new Uint8Array(12), { protocol: 6, ...shape })
  const at = udpOffset(shape)
  bytes.fill(0, at)
  const view = new DataView(bytes.buffer, at)
  view.setUint16(0, 50_000)
  view.setUint16(2, port)
  view.setUint8(12, 5 << 4)
  view.setUint8(13, flags)
  return bytes
}

function send(ingress: Ingress, packet: Uint8Array): boolean {
  const { action, packet: out } = ingress.program.testRun(packet)
  assert.ok(action === PASS || action === DROP)
  assert.deepEqual(out, packet, 'a segment is changed')
  return action === PASS
}

const from = (last: number): FrameShape => ({ from: Uint8Array.of(10, 0, 0, last) })

test('one source opens more than its share, or another pays for it', { skip }, () => {
  const ingress = open({ source: SLOW })
  const passed = Array.from({ length: 9 }, () => send(ingress, segment(SYN, from(1))))
  assert.deepEqual(passed, [...Array(5).fill(true), ...Array(4).fill(false)])
  for (const shape of [from(2), { ...from(3), vlans: 2 }, { ...from(4), options: 40 }]) {
    assert.ok(send(ingress, segment(SYN, shape)))
  }
  const { syn, syn_source: bySource, syn_total: byTotal, passed: all } = ingress.counters()
  assert.deepEqual([syn, bySource, byTotal, all], [12, 4, 0, 8])
})

test('addresses of one IPv6 network count as many sources', { skip }, () => {
  const ingress = open({ source: SLOW })
  const source = (network: number, host: number): FrameShape => {
    const address = new Uint8Array(16)
    address[7] = network
    address[15] = host
    return { ip: 6, from: address }
  }
  for (let host = 0; host < 5; host++) assert.ok(send(ingress, segment(SYN, source(1, host))))
  assert.ok(!send(ingress, segment(SYN, source(1, 77))))
  assert.ok(send(ingress, segment(SYN, source(2, 77))))
  // An extension header (destination options) must not hide it.
  const plain = segment(SYN, source(1, 78))
  const hidden = new Uint8Array(plain.length + 8)
  hidden.set(plain.subarray(0, 54))
  hidden.set([6, 0, 1, 4, 0, 0, 0, 0], 54)
  hidden.set(plain.subarray(54), 62)
  hidden[20] = 60
  assert.ok(!send(ingress, hidden))
})

test('many sources together open more than the server takes', { skip }, () => {
  const ingress = open({ source: SLOW, total: { perSecond: 0.01, burst: 20 } })
  let passed = 0
  for (let i = 0; i < 100; i++) if (send(ingress, segment(SYN, from(i)))) passed++
  assert.equal(passed, 20)
  assert.equal(ingress.counters()['syn_total'], 80)
})

test('a rate comes back too soon or never', { skip }, async () => {
  const ingress = open({ source: { perSecond: 20, burst: 1 } })
  const started = performance.now()
  for (let passed = 0; passed < 4;) {
    if (send(ingress, segment(SYN, from(1)))) passed++
    await new Promise((resolve) => setTimeout(resolve, 1))
  }
  const elapsedMs = performance.now() - started
  assert.ok(elapsedMs >= 149, `three more connections after ${elapsedMs} ms at 20 a second`)
})

test('what asks for no connection is limited, or anything while it is off', { skip }, () => {
  const limited = open({ source: SLOW })
  for (let i = 0; i < 20; i++) {
    for (const flags of [ACK, SYN | ACK, 1, 4, 0]) {
      assert.ok(send(limited, segment(flags, from(1))))
    }
    assert.ok(send(limited, segment(SYN, from(1), PORT + 1)))
    assert.ok(send(limited, segment(SYN, { ...from(1), fragment: 185 })))
  }
  const whole = segment(SYN, from(1))
  for (let length = 14; length < 54; length++) assert.ok(send(limited, whole.slice(0, length)))
  // On their way to another machine.
  limited.setAddresses([Uint8Array.of(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 9, 8, 6)])
  for (let i = 0; i < 20; i++) assert.ok(send(limited, segment(SYN, from(1))))
  const off = open(undefined)
  for (let i = 0; i < 20; i++) assert.ok(send(off, segment(SYN, from(1))))
  assert.equal(limited.counters()['syn'], 0)
  assert.equal(off.counters()['syn'], 0)
  assert.throws(() => open({ source: { perSecond: 0, burst: 1 } }), /a second/)
})
