// Owns the ring thread as the main thread sees it: prompts come out, answers go in.

import { Worker } from 'node:worker_threads'
import { LatticeError, toLatticeError } from '../errors.ts'
import { ring } from '../ffi/bell.ts'
import { closeFd } from '../ffi/libc.ts'
import type { DirectNews, DirectReport } from './direct-answers.ts'
import type { WireAnswer, WireRequest } from './exchange.ts'
import {
  ASLEEP,
  type FromRing,
  type RingLosses,
  type RingThreadOptions,
  SAID,
  type ToRing,
} from './ring-messages.ts'

export interface RingEvents {
  /** Starts a request; returns what aborts it. Must not throw. */
  start(wire: WireRequest, answer: WireAnswer): () => void
  claimed(tenant: number, request: bigint): void
  finished(tenant: number, request: bigint, usedTokens: number): void
  /** Of prompts that the thread has queued itself. */
  direct?(report: DirectReport): void
  /** The thread is gone; nothing more comes. */
  failed(error: LatticeError): void
}

type Ready = Extract<FromRing, { kind: 'ready' }>

export class Ring {
  /** Of the AF_XDP sockets, by queue, for the program's map of rings. */
  readonly fds: readonly number[]
  readonly zeroCopy: boolean
  losses: RingLosses = { received: 0, sent: 0 }
  private readonly worker: Worker
  private readonly bell: number
  private readonly signal: Int32Array
  private readonly events: RingEvents
  private readonly aborts = new Map<number, () => void>()
  private readonly drained: (() => void)[] = []
  private readonly outbox: ToRing[] = []
  private over = false

  private constructor(
    worker: Worker,
    { fds, zeroCopy, bell }: Ready,
    signal: Int32Array,
    events: RingEvents,
  ) {
    this.worker = worker
    this.signal = signal
    this.fds = fds
    this.zeroCopy = zeroCopy
    this.bell = bell
    this.events = events
    worker.on('message', (messages: FromRing[]) => {
      for (const message of messages) this.receive(message)
    })
    worker.on('error', (thrown) => this.fail(toLatticeError(thrown)))
    worker.on('exit', () => {
      // Not before: its number could be another file's by the time it is rung.
      this.outbox.length = 0
      closeFd(bell)
      this.fail(ended())
    })
  }

  /** @throws LatticeError what kept a socket from being opened; then none is open */
  static async open(options: Omit<RingThreadOptions, 'signal'>, events: RingEvents): Promise<Ring> {
    const signal = new SharedArrayBuffer(8)
    const workerData: RingThreadOptions = { ...options, signal }
    const url = new URL('./ring-thread.ts', import.meta.url)
    const worker = new Worker(url, { workerData, name: 'ring' })
    const ready = await new Promise<Ready>((resolve, reject) => {
      worker.once('message', ([message]: FromRing[]) => {
        if (message?.kind === 'ready') resolve(message)
        else if (message?.kind === 'failed') {
          // Its sockets are closed when it has ended.
          worker.once('exit', () => reject(LatticeError.fromJSON(message.error)))
        }
      })
      worker.once('error', (thrown) => reject(toLatticeError(thrown)))
    })
    for (const event of ['message', 'error', 'exit']) worker.removeAllListeners(event)
    return new Ring(worker, ready, new Int32Array(signal), events)
  }

  /** Resolves when all that was said has arrived, or nobody listens any more. */
  async drain(): Promise<void> {
    if (this.over) return
    const drained = new Promise<void>((resolve) => this.drained.push(resolve))
    this.say({ kind: 'drain' })
    await drained
  }

  /** What the engine says of prompts that the thread has queued itself. */
  tell(news: DirectNews): void {
    this.say(news)
  }

  async close(): Promise<void> {
    if (this.over) return
    this.over = true
    const exited = new Promise<void>((resolve) => this.worker.once('exit', () => resolve()))
    this.post({ kind: 'close' })
    await exited
    for (const resolve of this.drained.splice(0)) resolve()
  }

  private receive(message: FromRing): void {
    if (message.kind === 'start') this.start(message.id, message.wire)
    else if (message.kind === 'abort') {
      const abort = this.aborts.get(message.id)
      this.aborts.delete(message.id)
      abort?.()
    } else if (message.kind === 'claimed') {
      const { tenants, requests } = message
      tenants.forEach((tenant, i) => this.events.claimed(tenant, requests[i]!))
    } else if (message.kind === 'finished') {
      this.events.finished(message.tenant, message.request, message.usedTokens)
    } else if (message.kind === 'lost') this.losses = message.losses
    else if (message.kind === 'drained') for (const resolve of this.drained.splice(0)) resolve()
    else if (message.kind === 'failed') this.fail(LatticeError.fromJSON(message.error))
    else if (message.kind !== 'ready') this.events.direct?.(message)
  }

  private start(id: number, wire: WireRequest): void {
    let isOver = false
    const abort = this.events.start(wire, {
      tokens: (ids, text) => this.say({ kind: 'tokens', id, ids, text }),
      end: (code, usage) => {
        isOver = true
        this.aborts.delete(id)
        this.say({ kind: 'end', id, code, usage })
      },
    })
    if (!isOver) this.aborts.set(id, abort)
  }

  private say(message: ToRing): void {
    if (!this.over) this.post(message)
  }

  /** With everything else that is said in this turn of the event loop. */
  private post(message: ToRing): void {
    if (this.outbox.push(message) === 1) setImmediate(() => this.flush())
  }

  private flush(): void {
    if (this.outbox.length === 0) return
    this.worker.postMessage(this.outbox.splice(0))
    Atomics.add(this.signal, SAID, 1)
    if (Atomics.load(this.signal, ASLEEP) === 1) ring(this.bell)
  }

  private fail(error: LatticeError): void {
    if (this.over) return
    this.over = true
    for (const abort of this.aborts.values()) abort()
    this.aborts.clear()
    for (const resolve of this.drained.splice(0)) resolve()
    this.events.failed(error)
  }
}

function ended(): LatticeError {
  return new LatticeError('internal', 'The ring thread has ended.')
}
