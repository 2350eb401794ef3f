// Owns the question whether the kernel's word of a disconnect is worth a program: how long after a
// client's RST or FIN Node says 'close', and how long after it a thread that reads the ring of
// bpf/disconnect.bpf.c knows, with an idle event loop and one that is busy; and what looking at
// that ring costs when nobody went.
//
//   node bench/disconnect.ts [ROUNDS]

import { spawn } from 'node:child_process'
import { createServer, type Socket } from 'node:net'
import type { AddressInfo } from 'node:net'
import { Worker, isMainThread, parentPort, workerData } from 'node:worker_threads'
import { GoneClients } from '../src/engine/gone.ts'
import { BpfRing } from '../src/ffi/bpf-ring.ts'
import { Disconnects } from '../src/net/disconnects.ts'

/** A chat template over a long conversation and its tokens take the main thread so long. */
const BUSY_MS = 200

/** Connects, says so, and goes in the way it is told, saying when. */
const CLIENT = `
const s = require('node:net').connect(Number(process.argv[1]), '127.0.0.1', () => s.write('x'))
process.stdin.once('data', (how) => {
  const now = process.hrtime.bigint()
  if (String(how).trim() === 'reset') s.resetAndDestroy(); else s.end()
  process.stdout.write(now + '\\n')
})`

if (isMainThread) await main(Number(process.argv[2] ?? 15))
else watch()

async function main(rounds: number): Promise<void> {
  const disconnects = Disconnects.open()
  const server = createServer({ allowHalfOpen: true })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as AddressInfo
  const seen = new BigInt64Array(new SharedArrayBuffer(16))
  costOfLooking(disconnects.ring)
  const worker = new Worker(import.meta.filename, { workerData: { ...disconnects.ring, seen } })
  await new Promise((resolve) => worker.once('online', resolve))
  console.log('ms after the client went (median, worst): LOOP  HOW  NODE  RING')
  for (const [loop, busyMs] of [
    ['idle', 0],
    ['busy', BUSY_MS],
  ] as const) {
    for (const how of ['reset', 'end']) {
      const node: number[] = []
      const ring: number[] = []
      for (let i = 0; i < rounds; i++) {
        const at = await round(server, port, how, busyMs, seen)
        node.push(at.node)
        ring.push(at.ring)
      }
      console.log([loop, how, show(node), show(ring)].join('  '))
    }
  }
  await worker.terminate()
  server.close()
  disconnects.close()
}

/** As the engine's thread does, between two steps. */
function costOfLooking({ fd, bytes }: { fd: number; bytes: number }): void {
  const ring = new BpfRing(fd, bytes)
  const gone = new GoneClients((take) => ring.drain(take))
  const times = 1_000_000
  const look = (): void => {
    for (let i = 0; i < times; i++) gone.look(() => {})
  }
  look()
  const before = process.cpuUsage().user
  look()
  const ns = ((process.cpuUsage().user - before) * 1000) / times
  console.log(`looking when nobody went: ${ns.toFixed(0)} ns`)
  ring.close()
}

async function round(
  server: ReturnType<typeof createServer>,
  port: number,
  how: string,
  busyMs: number,
  seen: BigInt64Array,
): Promise<{ node: number; ring: number }> {
  Atomics.store(seen, 0, 0n)
  const client = spawn(process.execPath, ['-e', CLIENT, String(port)], { stdio: 'pipe' })
  const socket = await new Promise<Socket>((resolve) => server.once('connection', resolve))
  await new Promise((resolve) => socket.once('data', resolve))
  const said = new Promise<bigint>((resolve) => {
    client.stdout.once('data', (text) => resolve(BigInt(String(text).trim())))
  })
  const closed = new Promise<bigint>((resolve) => {
    const done = () => resolve(process.hrtime.bigint())
    socket
      .once('end', done)
      .once('close', done)
      .once('error', () => {})
  })
  client.stdin.write(`${how}\n`)
  // It has left: a pipe that has room is written to at once.
  const end = performance.now() + busyMs
  while (performance.now() < end);
  const [went, noticed] = await Promise.all([said, closed])
  while (Atomics.load(seen, 0) === 0n) await new Promise((resolve) => setTimeout(resolve, 1))
  const at = Atomics.load(seen, 0)
  socket.destroy()
  client.kill()
  return { node: Number(noticed - went) / 1e6, ring: Number(at - went) / 1e6 }
}

/** As an engine thread would, between steps: here every millisecond. */
function watch(): void {
  const { fd, bytes, seen } = workerData as { fd: number; bytes: number; seen: BigInt64Array }
  const ring = new BpfRing(fd, bytes)
  const pause = new Int32Array(new SharedArrayBuffer(4))
  parentPort?.on('message', () => {})
  for (;;) {
    ring.drain(() => void Atomics.store(seen, 0, process.hrtime.bigint()))
    Atomics.wait(pause, 0, 0, 1)
  }
}

function show(values: number[]): string {
  const sorted = values.toSorted((a, b) => a - b)
  return `${sorted[sorted.length >> 1]!.toFixed(1)}, ${sorted.at(-1)!.toFixed(1)}`
}
