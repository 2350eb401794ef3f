// Owns the thread that an interface's datagrams reach first: it takes prompts from AF_XDP rings,
// runs the replica's end of the protocol, and sleeps in one place for the rings and for news from
// the main thread. Entry point of a worker.

import { parentPort, receiveMessageOnPort, workerData } from 'node:worker_threads'
import { present } from '../assert.ts'
import { toLatticeError } from '../errors.ts'
import { openBell } from '../ffi/bell.ts'
import { PacketSocket } from '../ffi/packet-socket.ts'
import { XdpSocket } from '../ffi/xdp-socket.ts'
import { openModel } from '../model/load.ts'
import { loadTokenizer } from '../text/load.ts'
import { DirectAnswers } from './direct-answers.ts'
import type { WireAnswer, WireRequest } from './exchange.ts'
import type { Intake, IntakeEvents } from './intake.ts'
import { Replica } from './replica.ts'
import {
  ASLEEP,
  type FromRing,
  type RingLosses,
  type RingThreadOptions,
  SAID,
  type ToRing,
} from './ring-messages.ts'
import { openSource, type RingSource } from './ring-source.ts'

const port = present(parentPort, 'the parent thread')
const options = workerData as RingThreadOptions
const { mode, busyPollBudget, keys, flows } = options

/** How long a sleep lasts at most, and how often lost frames are counted. */
const SLEEP_MS = 1000
/** Whoever is not claimed is given up after 10 s. */
const CLAIM_MS = 1000
/** A place is free again so much later at most. */
const FINISH_MS = 2

const sockets: XdpSocket[] = []
/** Answers leave through the kernel's stack, where the egress program accounts for them. */
let out: PacketSocket | undefined
/** Undefined if every prompt goes to the main thread. */
let direct: DirectAnswers | undefined
const answers = new Map<number, WireAnswer>()
const losses: RingLosses = { received: 0, sent: 0 }
let source: RingSource | undefined
/** The time of this turn. */
let nowMs = 0
let nextId = 1
let draining = false
const signal = new Int32Array(options.signal)
let heard = 0

/** What is to be told at the end of this turn. */
let news: FromRing[] = []
let given: ArrayBuffer[] = []
/** One message for all: each of its own would cost more than all else that is told of a prompt. */
let claims: { tenants: number[]; requests: bigint[] } = { tenants: [], requests: [] }

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

function claim(tenant: number, request: bigint): void {
  claims.tenants.push(tenant)
  claims.requests.push(request)
  tellMs = Math.min(tellMs, nowMs + CLAIM_MS)
}

function tell(): void {
  if (nowMs < tellMs) return
  const { tenants, requests } = claims
  const claimed: FromRing = { kind: 'claimed', tenants, requests: BigUint64Array.from(requests) }
  port.postMessage(tenants.length > 0 ? [claimed, ...news] : news, given)
  claims = { tenants: [], requests: [] }
  news = []
  given = []
  tellMs = Infinity
}

function makeReplica(open: (events: IntakeEvents) => Intake): Replica {
  return new Replica(open, {
    now: () => nowMs,
    timeUs: () => BigInt(Date.now()) * 1000n,
    claimed: claim,
    start(lent, answer) {
      const abort = direct?.start(options.direct?.publishes ? owned(lent) : lent, answer)
      if (abort) return abort
      const wire = owned(lent)
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

/** Of a prompt that is kept: a part of what is somebody else's will be another's. */
function owned(wire: WireRequest): WireRequest {
  const { prompt } = wire
  return prompt.length === prompt.buffer.byteLength ? wire : { ...wire, prompt: prompt.slice() }
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

function run(source: RingSource, replica: Replica): void {
  let countedMs = nowMs
  let next: number | undefined
  for (;;) {
    wait(source, Math.min(next ?? Infinity, tellMs, nowMs + SLEEP_MS))
    nowMs = source.nowMs
    // Before the turn: whoever has something to say wants one.
    if (!hear()) return
    source.take()
    direct?.tell()
    next = replica.turn()
    out?.flush()
    if (draining && replica.settled) {
      draining = false
      say({ kind: 'drained' })
    }
    if (nowMs - countedMs >= SLEEP_MS) {
      countedMs = nowMs
      tellLosses(source)
    }
    tell()
  }
}

/** Who says something afterwards rings the bell; what was said before is seen here. */
function wait(source: RingSource, untilMs: number): void {
  Atomics.store(signal, ASLEEP, 1)
  source.wait(Atomics.load(signal, SAID) === heard ? untilMs : 0)
  Atomics.store(signal, ASLEEP, 0)
}

function tellLosses({ lost }: RingSource): void {
  const received = sockets.reduce((sum, socket) => sum + lostBy(socket), lost.received)
  const { sent } = lost
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
  const how = { sockets, out, bell, busyPollBudget, keys, flows }
  const replica = makeReplica((events) => {
    source = openSource(options.ring, how, events)
    return source.intake
  })
  nowMs = present(source, 'the source').nowMs
  say({ kind: 'ready', fds, bell: bell.fd, zeroCopy })
  tell()
  run(present(source, 'the source'), replica)
} catch (thrown) {
  say({ kind: 'failed', error: toLatticeError(thrown).toJSON() })
  tell()
}
source?.close()
for (const socket of sockets) socket.close()
out?.close()
port.close()
