// Owns a server's datagram path over the server's life: attached to one interface or to none, at
// the start or later.

import type { Engine } from '../engine/api.ts'
import type { LatticeError } from '../errors.ts'
import type { ChatTemplate } from '../text/chat-template.ts'
import type { Tokenizer } from '../text/tokenizer.ts'
import { type DatagramOptions, DatagramServer, type DatagramStatus } from './datagram-server.ts'
import { EngineAnswers } from './engine-answers.ts'
import { isLoopback, refused } from './interface.ts'
import { PrefixNews } from './prefix-news.ts'
import type { DatagramTenant } from './tenants.ts'

export interface NetServiceOptions {
  engine: Engine
  tokenizer: Tokenizer
  template: ChatTemplate | undefined
  /** Without any, nothing can be attached. */
  tenants: readonly DatagramTenant[]
  maxRunning: number
  /** The engine has a prefix cache: what is in it is published. */
  publishes: boolean
  /** Where the HTTP server listens. */
  host?: string
  warn: (line: string) => void
}

/** How to attach; what is left out is chosen by `DATAGRAM_DEFAULTS`. */
export type AttachOptions = Pick<
  DatagramOptions,
  'name' | 'queue' | 'force' | 'mode' | 'allowGeneric' | 'busyPollBudget' | 'port' | 'syn'
>

export class NetService {
  private readonly options: NetServiceOptions
  private readonly answers: EngineAnswers
  private readonly news: PrefixNews | undefined
  private server: DatagramServer | undefined
  /** Of our own engine, among the replicas. */
  private index = 0
  /** Attaching or detaching: only one at a time. */
  private busy = false

  constructor(options: NetServiceOptions) {
    this.options = options
    const { engine, tenants } = options
    this.news = options.publishes
      ? new PrefixNews(engine, tenants, (hash, isHeld) => {
          this.server?.publish(this.index, hash, isHeld)
        })
      : undefined
    const onComputed = this.news?.computed
    this.answers = new EngineAnswers(onComputed ? { ...options, onComputed } : options)
  }

  /** @throws LatticeError `net_refused`, and as `DatagramServer.start` does; nothing is attached */
  async attach(how: AttachOptions): Promise<DatagramStatus> {
    const { engine, tenants, maxRunning, host, warn } = this.options
    if (tenants.length === 0) {
      throw refused('This server knows no tenants.', 'Start it with --net-tenants FILE.')
    }
    if (this.server) {
      const { interface: name } = this.server.status()
      throw refused(`This server is attached to ${name} already.`, 'Detach it first.')
    }
    if (how.syn && host !== undefined) checkSyn(host)
    return await this.alone(async () => {
      const server = await DatagramServer.start({
        ...how,
        tenants,
        maxRunning,
        onFailure: (error: LatticeError) => warn(`datagrams are refused: ${error.message}`),
      })
      this.index = server.addReplica({
        model: engine.model.id,
        start: (wire, tenant, answer) => this.answers.start(wire, tenant, answer),
      })
      this.server = server
      this.news?.begin()
      return server.status()
    })
  }

  /** @throws LatticeError `net_refused` if it is attached to nothing */
  async detach(): Promise<void> {
    if (!this.server)
      throw refused('This server is attached to no interface.', 'Nothing is to be done.')
    await this.alone(() => this.close())
  }

  /** Undefined while it is attached to nothing. */
  status(): DatagramStatus | undefined {
    return this.server?.status()
  }

  /** Refuses new requests; call it before the engine drains, `close` after. */
  refuse(): void {
    this.server?.refuse()
  }

  /** Lets what was answered arrive, then detaches. */
  async close(): Promise<void> {
    const { server } = this
    this.news?.end()
    await server?.drain()
    this.server = undefined
    await server?.close()
  }

  private async alone<T>(work: () => Promise<T>): Promise<T> {
    if (this.busy) throw refused('It is being attached or detached.', 'Try again in a moment.')
    this.busy = true
    try {
      return await work()
    } finally {
      this.busy = false
    }
  }
}

/**
 * New connections are limited where they come from elsewhere.
 * @param host where the HTTP server listens
 * @throws LatticeError `net_refused` if nobody else reaches it
 */
export function checkSyn(host: string): void {
  if (!isLoopback(host)) return
  throw refused(
    `The HTTP server listens on ${host}, which no interface leads to: there is nothing to limit.`,
    'Start it with --host 0.0.0.0 or the interface’s address, or leave --syn out.',
  )
}
