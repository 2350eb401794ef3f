// Owns a thread that reads one word of memory and tells what it read: it may have to wait there.

import { parentPort, Worker, workerData } from 'node:worker_threads'
import { viewMemory } from '../../src/ffi/libc.ts'

interface Touch {
  address: number
  /** 1: it is about to read. */
  begun: SharedArrayBuffer
}

const touch = workerData as Touch | null
if (parentPort && touch?.begun) {
  const word = new Int32Array(viewMemory(touch.address, 4))
  Atomics.store(new Int32Array(touch.begun), 0, 1)
  Atomics.notify(new Int32Array(touch.begun), 0)
  parentPort.postMessage(word[0])
}

/** Resolves with the 32 bits at an address; `begun` when it tries to read them. */
export function touchFromThread(address: number): { begun: Promise<void>; value: Promise<number> } {
  const begun = new Int32Array(new SharedArrayBuffer(4))
  const worker = new Worker(new URL(import.meta.url), {
    workerData: { address, begun: begun.buffer },
  })
  const value = new Promise<number>((resolve, reject) => {
    worker.once('message', resolve)
    worker.once('error', reject)
  })
  const wait = Atomics.waitAsync(begun, 0, 0)
  return { begun: Promise.resolve(wait.value).then(() => undefined), value }
}
