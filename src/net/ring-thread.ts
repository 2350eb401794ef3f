// Owns the thread that an interface's datagrams reach first: it takes frames from AF_XDP rings,
// runs the replica's end of the protocol, and sleeps in one place for the rings and for news from
// the main thread. Entry point of a worker.

import { parentPort, receiveMessageOnPort, workerData } from 'node:worker_threads'
import { present } from '../assert.ts'
import { toLatticeError } from '../errors.ts'
import { type Bell, openBell } from '../ffi/bell.ts'
import { PacketSocket } from '../ffi/packet-socket.ts'
import { XdpSocket } from '../ffi/xdp-socket.ts'
import { openModel } from '../model/load.ts'
import { loadTokenizer } from '../text/load.ts'
import { DirectAnswers } from './direct-answers.ts'
import type { WireAnswer } from './exchange.ts'
import { Replica } from './replica.ts'
import {
  ASLEEP,
  type FromRing,
  type RingLosses,
  type RingThreadOptions,
  SAID,
  type ToRing,
} from './ring-messages.ts'
import { type SipKey, sipKey } from './siphash.ts'

const port = present(parentPort, 'the parent thread')
const options = workerData as RingThreadOptions
const { mode, busyPollBudget } = options

/** How long a sleep lasts at most, and how often lost frames are counted. */
const SLEEP_MS = 1000
/** Whoever is not claimed is given up after 10 s. */
const CLAIM_MS = 1000
/** A place is free again so much later at most. */
const FINISH_MS = 2
/** With busy-polling: so long after the last frame the driver is asked again and again. */
const BUSY_MS = 2
/** Frames of a queue before what they ask for is sent. */
const BURST = 256

const sockets: XdpSocket[] = []
/** Answers leave through the kernel's stack, where the egress program accounts for them. */
let out: PacketSocket | undefined
/** Undefined if every prompt goes to the main thread. */
let direct: DirectAnswers | undefined
const answers = new Map<number, WireAnswer>()
const losses: RingLosses = { received: 0, sent: 0 }
/** The time of this turn: asking for it costs as much as a short hash. */
let nowMs = performance.now()
let nextId = 1
let draining = false
const signal = new Int32Array(options.signal)
let heard = 0

/** What is to be told at the end of this turn. */
let news: FromRing[] = []
let given: ArrayBuffer[] = []

let tellMs = Infinity

/**
 * Told with everything else of this turn, or with what comes later: a message wakes the main
 * thread, whatever is in it.
 * @param withinMs how long it may wait for others
 */
function say(message: FromRing, withinMs = 0, transfer?: ArrayBuffer): void {
  news.push(message)
  if (transfer) given.push(transfer)
  tellMs = Math.min(tellMs, nowMs + withinMs)
}

function tell(): void {
  if (nowMs < tellMs) return
  port.postMessage(news, given)
  news = []
  given = []
  tellMs = Infinity
}

function makeReplica(): Replica {
  const keys = new Map<number, SipKey>()
  for (const [tenant, pair] of options.keys) {
    pair.forEach((key, index) => keys.set(2 * tenant + index, sipKey(key)))
  }
  const known = (tenant: number, index: number) =>
    index < 2 ? keys.get(2 * tenant + index) : undefined
  return new Replica(known, {
    now: () => nowMs,
    timeUs: () => BigInt(Date.now()) * 1000n,
    claimed: (tenant, request) => say({ kind: 'claimed', tenant, request }, CLAIM_MS),
    start(wire, answer) {
      const abort = direct?.start(wire, answer)
      if (abort) return abort
      const id = nextId++
      answers.set(id, answer)
      say({ kind: 'start', id, wire }, 0, wire.prompt.buffer as ArrayBuffer)
      return () => {
        if (answers.delete(id)) say({ kind: 'abort', id })
      }
    },
    finished: (tenant, request, usedTokens) => {
      say({ kind: 'finished', tenant, request, usedTokens }, FINISH_MS)
    },
    send: (write) => out?.send(write),
  })
}

/** Returns false when the thread is to end. */
function hear(): boolean {
  const said = Atomics.load(signal, SAID)
  if (said === heard) return true
  heard = said
  for (let item = receiveMessageOnPort(port); item; item = receiveMessageOnPort(port)) {
    for (const message of item.message as ToRing[]) {
      if (message.kind === 'close') return false
      if (message.kind === 'drain') draining = true
      else if (message.kind === 'tokens') answers.get(message.id)?.tokens(message.ids, message.text)
      else if (message.kind !== 'end') direct?.hear(message)
      else {
        const answer = answers.get(message.id)
        answers.delete(message.id)
        answer?.end(message.code, message.usage)
      }
    }
  }
  return true
}

function run(replica: Replica, bell: Bell): void {
  const take = (view: DataView, at: number, bytes: number) => replica.take(view, at, bytes)
  let countedMs = nowMs
  let busyUntilMs = nowMs
  while (hear()) {
    nowMs = performance.now()
    let taken = 0
    for (const socket of sockets) taken += socket.receive(take, BURST)
    direct?.tell()
    const next = replica.turn()
    out?.flush()
    if (draining && replica.settled) {
      draining = false
      say({ kind: 'drained' })
    }
    if (nowMs - countedMs >= SLEEP_MS) {
      countedMs = nowMs
      tellLosses()
    }
    tell()
    if (taken > 0) {
      busyUntilMs = nowMs + BUSY_MS
      continue
    }
    if (busyPollBudget > 0 && nowMs < busyUntilMs) {
      for (const socket of sockets) socket.poll()
      continue
    }
    const until = Math.min(next ?? Infinity, tellMs, nowMs + SLEEP_MS)
    const waitMs = Math.ceil(until - performance.now())
    if (waitMs > 0) sleep(bell, waitMs)
  }
}

/** Who says something afterwards rings the bell; what was said before is seen here. */
function sleep(bell: Bell, waitMs: number): void {
  Atomics.store(signal, ASLEEP, 1)
  if (Atomics.load(signal, SAID) === heard) bell.wait(waitMs)
  Atomics.store(signal, ASLEEP, 0)
}

function tellLosses(): void {
  const received = sockets.reduce((sum, socket) => sum + lostBy(socket), 0)
  const sent = out?.lost ?? 0
  if (received === losses.received && sent === losses.sent) return
  losses.received = received
  losses.sent = sent
  say({ kind: 'lost', losses })
}

function lostBy(socket: XdpSocket): number {
  const { dropped, ringFull } = socket.statistics()
  return Number(dropped + ringFull)
}

try {
  for (const queue of options.queues) {
    sockets.push(new XdpSocket(options.ifindex, queue, { mode, busyPollBudget }))
  }
  out = new PacketSocket(options.ifindex)
  if (options.direct) {
    const tokenizer = loadTokenizer(openModel(options.direct.modelPath))
    direct = new DirectAnswers(options.direct, tokenizer, (report) => say(report))
  }
  const fds = sockets.map(({ fd }) => fd)
  const bell = openBell(fds)
  const zeroCopy = sockets.every((socket) => socket.zeroCopy)
  say({ kind: 'ready', fds, bell: bell.fd, zeroCopy })
  tell()
  run(makeReplica(), bell)
} catch (thrown) {
  say({ kind: 'failed', error: toLatticeError(thrown).toJSON() })
  tell()
}
for (const socket of sockets) socket.close()
out?.close()
port.close()
