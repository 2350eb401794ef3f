// Owns the comparison of the ways out for an answer: CPU time a datagram by AF_XDP (which tc never
// sees), by a packet socket and by a UDP socket through the stack, with the egress program attached
// and without. Two namespaces on veth; the other side drops in its driver.
//
//   node bench/egress.ts [DATAGRAMS]

import { execFileSync, spawn } from 'node:child_process'
import koffi from 'koffi'
import { PacketSocket } from '../src/ffi/packet-socket.ts'
import { interfaceIndex, XdpSocket } from '../src/ffi/xdp-socket.ts'
import { Egress } from '../src/net/egress.ts'
import { Ingress } from '../src/net/ingress.ts'
import { HEADER_BYTES, MESSAGE_TYPES, writeHeader, writeTokens } from '../src/net/protocol.ts'
import { sipKey } from '../src/net/siphash.ts'
import { inNamespace, ip, twoHosts } from '../test/net/namespaces.ts'
import { frame } from '../test/support/packets.ts'

const [mode, count = '200000', address = '', peerMac = ''] = process.argv.slice(2)
const BATCH = 64
const RUNS = 5

if (mode === 'drop') {
  // The other side: a program that drops datagrams of tenants it does not know.
  const ingress = Ingress.load({ port: 40_000 })
  ingress.program.attachXdp(interfaceIndex('veth-c'), 'native')
  console.log('ready')
  setInterval(() => {}, 1000)
} else if (mode === 'send') await send()
else await main(Number(mode ?? 200_000))

async function main(datagrams: number): Promise<void> {
  const hosts = await twoHosts()
  const { client, server } = hosts
  // Its program only passes; one that drops takes its place.
  await client.end()
  const script = import.meta.filename
  const drop = spawn(...inNamespace(client.namespace, script, 'drop'), {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  try {
    await new Promise((resolve) => drop.stdout.once('data', resolve))
    const links = JSON.parse(ip('-n', client.namespace, '-j', 'link', 'show', client.link))
    const mac = (links as { address: string }[])[0]!.address
    const neighbour = [client.address, 'lladdr', mac, 'dev', server.link]
    ip('-n', server.namespace, 'neigh', 'replace', ...neighbour)
    const args = [script, 'send', String(datagrams), client.address, mac]
    const [command, rest] = inNamespace(server.namespace, ...args)
    execFileSync(command, rest, { stdio: 'inherit' })
  } finally {
    drop.kill('SIGKILL')
    await hosts.remove()
  }
}

async function send(): Promise<void> {
  const datagrams = Number(count)
  const ifindex = interfaceIndex('veth-s')
  console.log(`CPU ns a datagram, ${datagrams} of them, ${BATCH} a flush`)
  console.log('PAYLOAD  AF_XDP  PACKET  PACKET+TC  UDP  UDP+TC  SEEN BY TC')
  for (const bytes of [40, 400, 1200]) {
    const shape = { from: ip4('10.99.0.2'), fromPort: 7411, toPort: 40_000 }
    const whole = frame(datagram(bytes), shape)
    whole.set(peerMac.split(':').map((part) => Number.parseInt(part, 16)))
    whole.set(ip4(address), 30)
    const out: (number | string)[] = []
    const xdp = new XdpSocket(ifindex, 0)
    const write = (to: Uint8Array): number => {
      to.set(whole)
      return whole.length
    }
    out.push(
      measure(
        datagrams,
        () => {
          while (!xdp.send(write)) xdp.flush()
        },
        () => xdp.flush(),
      ),
    )
    xdp.close()
    const packet = new PacketSocket(ifindex)
    const udp = udpSocket(address, 40_000, datagram(bytes))
    const egress = Egress.load()
    const ways = [
      () =>
        measure(
          datagrams,
          () => packet.send(write),
          () => packet.flush(),
        ),
      () => measure(datagrams, udp.queue, udp.flush),
    ]
    for (const way of ways) {
      out.push(way())
      const detach = egress.attach('veth-s')
      out.push(way())
      detach()
    }
    const seen = (Number(egress.tenant(1).datagrams) / (2 * RUNS * datagrams)).toFixed(3)
    console.log([String(bytes).padStart(7), ...out, seen, packet.lost].join('  '))
    packet.close()
    udp.close()
    egress.close()
  }
}

/** The median of the runs. */
function measure(datagrams: number, queue: () => void, flush: () => void): number {
  const runs = Array.from({ length: RUNS }, () => {
    const start = process.cpuUsage()
    for (let i = 1; i <= datagrams; i++) {
      queue()
      if (i % BATCH === 0) flush()
    }
    flush()
    const { user, system } = process.cpuUsage(start)
    return ((user + system) * 1000) / datagrams
  })
  return Math.round(runs.toSorted((a, b) => a - b)[2]!)
}

function datagram(bytes: number): Uint8Array<ArrayBuffer> {
  const text = 'a'.repeat(bytes - 2 - 4 * 4)
  const payload = writeTokens([1, 2, 3, 4], text)
  const all = new Uint8Array(HEADER_BYTES + payload.length)
  all.set(payload, HEADER_BYTES)
  const header = { type: MESSAGE_TYPES.tokens, tenant: 1, payloadBytes: payload.length }
  writeHeader(new DataView(all.buffer), header, sipKey(new Uint8Array(16)))
  return all
}

function ip4(text: string): Uint8Array {
  return Uint8Array.from(text.split('.'), Number)
}

/** A connected UDP socket from the protocol's port that sends by sendmmsg. */
function udpSocket(to: string, port: number, payload: Uint8Array) {
  const libc = koffi.load('libc.so.6')
  const socket = libc.func('socket', 'int', ['int', 'int', 'int'])
  const bind = libc.func('bind', 'int', ['int', 'const void *', 'uint32_t'])
  const connect = libc.func('connect', 'int', ['int', 'const void *', 'uint32_t'])
  const sendmmsg = libc.func('sendmmsg', 'int', ['int', 'void *', 'uint', 'int'])
  const close = libc.func('close', 'int', ['int'])
  const name = (host: string, at: number): Uint8Array => {
    const view = new DataView(new ArrayBuffer(16))
    view.setUint16(0, 2, true)
    view.setUint16(2, at)
    new Uint8Array(view.buffer).set(ip4(host), 4)
    return new Uint8Array(view.buffer)
  }
  const fd: number = socket(2, 2, 0)
  bind(fd, name('0.0.0.0', 7411), 16)
  if (connect(fd, name(to, port), 16) < 0) throw new Error('connect')
  const frames = new Uint8Array(BATCH * 2048)
  const iovecs = new BigUint64Array(2 * BATCH)
  const messages = new BigUint64Array(8 * BATCH)
  for (let i = 0; i < BATCH; i++) {
    iovecs[2 * i] = BigInt(koffi.address(frames)) + BigInt(2048 * i)
    messages[8 * i + 2] = BigInt(koffi.address(iovecs)) + BigInt(16 * i)
    messages[8 * i + 3] = 1n
  }
  const lengths = new Uint32Array(iovecs.buffer)
  let queued = 0
  return {
    queue() {
      frames.set(payload, 2048 * queued)
      lengths[4 * queued + 2] = payload.length
      queued++
    },
    flush() {
      if (queued > 0) sendmmsg(fd, messages, queued, 0)
      queued = 0
    },
    close: () => void close(fd),
  }
}
