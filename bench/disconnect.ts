// Owns the question whether the kernel's word of a disconnect is worth a program: how long after a
// client's RST or FIN Node says 'close', and how long after it a thread that reads the ring of
// bpf/disconnect.bpf.c knows, with an idle event loop and one that is busy.
//
//   node bench/disconnect.ts [ROUNDS]

import { spawn } from 'node:child_process'
import { closeSync, mkdirSync, openSync, readFileSync, rmdirSync, writeFileSync } from 'node:fs'
import { createServer, type Socket } from 'node:net'
import type { AddressInfo } from 'node:net'
import { Worker, isMainThread, parentPort, workerData } from 'node:worker_threads'
import { ATTACH, attachLink } from '../src/ffi/bpf-link.ts'
import { BpfRing } from '../src/ffi/bpf-ring.ts'
import { BpfObject } from '../src/ffi/libbpf.ts'

const CGROUP = '/sys/fs/cgroup/unified'
const RING_BYTES = 1 << 16
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
  const folder = `${CGROUP}/lattice-${process.pid}`
  mkdirSync(folder)
  writeFileSync(`${folder}/cgroup.procs`, String(process.pid))
  const directory = openSync(folder, 'r')
  const server = createServer({ allowHalfOpen: true })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as AddressInfo
  const object = new BpfObject(
    readFileSync(new URL('../bpf/disconnect.o', import.meta.url)),
    (rodata) => new DataView(rodata.buffer, rodata.byteOffset).setUint16(0, port, true),
  )
  const detach = attachLink(object.program('disconnect').fd, directory, ATTACH.cgroupSockOps)
  const seen = new BigInt64Array(new SharedArrayBuffer(16))
  const fd = object.map('disconnects').fd
  const worker = new Worker(import.meta.filename, { workerData: { fd, seen } })
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
  detach()
  object.close()
  server.close()
  closeSync(directory)
  writeFileSync(`${CGROUP}/cgroup.procs`, String(process.pid))
  rmdirSync(folder)
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
  const { fd, seen } = workerData as { fd: number; seen: BigInt64Array }
  const ring = new BpfRing(fd, RING_BYTES)
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
