// Owns the ring thread as the main thread sees it: prompts come out, answers go in.

import { Worker } from 'node:worker_threads'
import { LatticeError, toLatticeError } from '../errors.ts'
import { ring } from '../ffi/bell.ts'
import type { MessageCode, WireSampling } from './protocol.ts'
import type { FromRing, RingThreadOptions, ToRing } from './ring-messages.ts'

export interface RingPrompt {
  tenant: number
  prompt: Uint8Array
  chat: boolean
  raw: boolean
  maxTokens: number
  sampling: WireSampling
}

export interface RingAnswer {
  tokens(ids: readonly number[], text: string): void
  end(code: MessageCode, outputTokens: number, cachedTokens: number): void
}

export interface RingEvents {
  /** Starts a request; returns what aborts it. */
  start(prompt: RingPrompt, answer: RingAnswer): () => void
  finished(tenant: number, request: bigint, usedTokens: number): void
  lost(dropped: bigint, ringFull: bigint): void
  /** The thread is gone; nothing more comes. */
  failed(error: LatticeError): void
}

export class Ring {
  /** Of the AF_XDP socket, for the program's map of rings. */
  readonly fd: number
  private readonly worker: Worker
  private readonly bell: number
  private readonly events: RingEvents
  private readonly aborts = new Map<number, () => void>()
  private closing = false

  private constructor(worker: Worker, fd: number, bell: number, events: RingEvents) {
    this.worker = worker
    this.fd = fd
    this.bell = bell
    this.events = events
    worker.on('message', (message: FromRing) => this.receive(message))
    worker.on('error', (thrown) => this.fail(toLatticeError(thrown)))
    worker.on('exit', () => this.fail(new LatticeError('internal', 'The ring thread has ended.')))
  }

  /** @throws LatticeError what kept the socket from being opened */
  static async open(options: RingThreadOptions, events: RingEvents): Promise<Ring> {
    const url = new URL('./ring-thread.ts', import.meta.url)
    const worker = new Worker(url, { workerData: options })
    const ready = await new Promise<Extract<FromRing, { kind: 'ready' }>>((resolve, reject) => {
      worker.once('message', (message: FromRing) => {
        if (message.kind === 'ready') resolve(message)
      })
      worker.once('error', (thrown) => reject(toLatticeError(thrown)))
    })
    for (const event of ['message', 'error']) worker.removeAllListeners(event)
    return new Ring(worker, ready.fd, ready.bell, events)
  }

  async close(): Promise<void> {
    this.closing = true
    const exited = new Promise<void>((resolve) => this.worker.once('exit', () => resolve()))
    this.say({ kind: 'close' })
    await exited
  }

  private receive(message: FromRing): void {
    if (message.kind === 'start') this.start(message)
    else if (message.kind === 'abort') this.aborts.get(message.id)?.()
    else if (message.kind === 'finished') {
      this.events.finished(message.tenant, message.request, message.usedTokens)
    } else if (message.kind === 'lost') this.events.lost(message.dropped, message.ringFull)
  }

  private start({ id, kind: _, ...prompt }: Extract<FromRing, { kind: 'start' }>): void {
    const answer: RingAnswer = {
      tokens: (ids, text) => this.say({ kind: 'tokens', id, ids, text }),
      end: (code, outputTokens, cachedTokens) => {
        this.aborts.delete(id)
        this.say({ kind: 'end', id, code, outputTokens, cachedTokens })
      },
    }
    this.aborts.set(id, this.events.start(prompt, answer))
  }

  private say(message: ToRing): void {
    this.worker.postMessage(message)
    ring(this.bell)
  }

  private fail(error: LatticeError): void {
    if (this.closing) return
    this.closing = true
    for (const abort of this.aborts.values()) abort()
    this.aborts.clear()
    this.events.failed(error)
  }
}
