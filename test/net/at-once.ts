// Owns one of two threads that give the ingress program the same packets at the same moments.

import { workerData } from 'node:worker_threads'
import { BpfProgram } from '../../src/ffi/libbpf.ts'

const { fd, packets, gate } = workerData as {
  fd: number
  packets: Uint8Array[]
  /** How often one has come to the gate. */
  gate: Int32Array
}
/** Then the other has no core to run on. */
const SPINS = 100_000

const program = Object.assign(Object.create(BpfProgram.prototype), { fd }) as BpfProgram
const packet = new Uint8Array(256)
const run = program.testRunner(packet, new Uint8Array(256))
for (const [i, bytes] of packets.entries()) {
  packet.set(bytes)
  Atomics.add(gate, 0, 1)
  for (let spins = 0; Atomics.load(gate, 0) < 2 * (i + 1); spins++) {
    if (spins > SPINS) Atomics.wait(gate, 0, Atomics.load(gate, 0), 1)
  }
  run(bytes.length)
}
