// Owns the thread that an interface's datagrams reach first: it takes frames from an AF_XDP ring,
// runs the replica's end of the protocol, and sleeps in one place for both the ring and news from
// the main thread. Entry point of a worker.

import { parentPort, receiveMessageOnPort, workerData } from 'node:worker_threads'
import { present } from '../assert.ts'
import { openBell } from '../ffi/bell.ts'
import { PacketSocket } from '../ffi/packet-socket.ts'
import { XdpSocket } from '../ffi/xdp-socket.ts'
import { Replica, type WireAnswer } from './replica.ts'
import type { FromRing, RingThreadOptions, ToRing } from './ring-messages.ts'
import { type SipKey, sipKey } from './siphash.ts'

const port = present(parentPort, 'the parent thread')
const options = workerData as RingThreadOptions
const { mode, busyPollBudget } = options
const socket = new XdpSocket(options.ifindex, options.queue, { mode, busyPollBudget })
// Answers leave through the kernel's stack, where the egress program accounts for them.
const out = new PacketSocket(options.ifindex)
const bell = openBell()
const keys = new Map<number, SipKey>()
for (const [tenant, pair] of options.keys) {
  pair.forEach((key, index) => keys.set(2 * tenant + index, sipKey(key)))
}
const answers = new Map<number, WireAnswer>()
let nextId = 1

const replica = new Replica((tenant, index) => keys.get(2 * tenant + index), {
  start({ request: _, ...request }, answer) {
    const id = nextId++
    answers.set(id, answer)
    say({ kind: 'start', id, ...request }, [request.prompt.buffer as ArrayBuffer])
    return () => {
      if (answers.delete(id)) say({ kind: 'abort', id })
    }
  },
  finished: (tenant, request, usedTokens) => {
    say({ kind: 'finished', tenant, request, usedTokens })
  },
  send: (write) => out.send(write),
})

/** How long a sleep lasts at most, so that lost frames are told. */
const SLEEP_MS = 1000

function say(message: FromRing, transfer: ArrayBuffer[] = []): void {
  port.postMessage(message, transfer)
}

/** Returns false when the thread is to end. */
function hear(): boolean {
  for (let item = receiveMessageOnPort(port); item; item = receiveMessageOnPort(port)) {
    const message = item.message as ToRing
    if (message.kind === 'close') return false
    const answer = answers.get(message.id)
    if (message.kind === 'tokens') answer?.tokens(message.ids, message.text)
    else {
      answers.delete(message.id)
      answer?.end(message.code, message.outputTokens, message.cachedTokens)
    }
  }
  return true
}

function run(): void {
  let lost = 0n
  for (;;) {
    if (!hear()) return
    const now = performance.now()
    const taken = socket.receive((view, at, bytes) => replica.take(view, at, bytes, now))
    const next = replica.turn(performance.now())
    out.flush()
    if (taken > 0 || busyPollBudget > 0) continue
    const waitMs = next === undefined ? SLEEP_MS : Math.min(SLEEP_MS, next - performance.now())
    if (waitMs > 0) bell.wait(socket.fd, Math.ceil(waitMs))
    const { dropped, ringFull } = socket.statistics()
    if (dropped + ringFull > lost) {
      lost = dropped + ringFull
      say({ kind: 'lost', dropped, ringFull })
    }
  }
}

say({ kind: 'ready', fd: socket.fd, bell: bell.fd })
run()
socket.close()
out.close()
bell.close()
port.close()
