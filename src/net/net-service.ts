// Owns a server's datagram path over the server's life: attached to one interface or to none, at
// the start or later.

import type { DirectSink, DirectWay, Engine } from '../engine/api.ts'
import type { LatticeError } from '../errors.ts'
import type { ChatTemplate } from '../text/chat-template.ts'
import type { Tokenizer } from '../text/tokenizer.ts'
import { type DatagramOptions, DatagramServer, type DatagramStatus } from './datagram-server.ts'
import type { DirectNews, DirectReport } from './direct-answers.ts'
import { EngineAnswers, failureLine } from './engine-answers.ts'
import { describeEvent, type NetEvent } from './decisions.ts'
import { isLoopback, refused } from './interface.ts'
import { JoinHub } from './join-hub.ts'
import { PrefixNews } from './prefix-news.ts'
import type { DatagramTenant } from './tenants.ts'
import { endCode, errorCode } from './wire-prompt.ts'

export interface NetServiceOptions {
  engine: Engine
  tokenizer: Tokenizer
  template: ChatTemplate | undefined
  /** Where the tokenizer is from: plain prompts then go to the engine by the short way. */
  modelPath?: string | undefined
  /** Without any, nothing can be attached. */
  tenants: readonly DatagramTenant[]
  maxRunning: number
  /** The engine has a prefix cache: what is in it is published. */
  publishes: boolean
  /** Where the HTTP server listens. */
  host?: string
  /** Sequences that run or wait in the engine, whoever asked for them; only ours unless given. */
  load?: () => number
  /** Where other engines of this machine join, once it is attached; nowhere unless given. */
  share?: string | undefined
  warn: (line: string) => void
  /** Decisions that the program tells of; a line each, and not too many. */
  log?: (line: string) => void
}

/** How to attach; what is left out is chosen by `DATAGRAM_DEFAULTS`. */
export type AttachOptions = Pick<
  DatagramOptions,
  | 'name'
  | 'queue'
  | 'force'
  | 'mode'
  | 'allowGeneric'
  | 'busyPollBudget'
  | 'ring'
  | 'port'
  | 'syn'
  | 'sampleEvery'
  | 'requests'
>

/** As often as an engine that has joined says it. */
const LOAD_MS = 250
/** Of decisions, in a second. */
const LINES_MAX = 20

export class NetService {
  private readonly options: NetServiceOptions
  private readonly answers: EngineAnswers
  private readonly news: PrefixNews | undefined
  private server: DatagramServer | undefined
  private hub: JoinHub | undefined
  /** Of the ring thread into the engine's queue. */
  private way: DirectWay | undefined
  private timer: NodeJS.Timeout | undefined
  /** Said in this second of decisions' time. */
  private lines = { second: 0, count: 0 }
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
    const onStopped = (): void => this.setStopped()
    this.answers = new EngineAnswers({ ...options, onStopped, ...(onComputed && { onComputed }) })
  }

  /** @throws LatticeError `net_refused`, and as `DatagramServer.start` does; nothing is attached */
  async attach(how: AttachOptions): Promise<DatagramStatus> {
    const { engine, tenants, maxRunning, host, share, warn } = this.options
    if (tenants.length === 0) {
      throw refused('This server knows no tenants.', 'Start it with --net-tenants FILE.')
    }
    if (this.server) {
      const { interface: name } = this.server.status()
      throw refused(`This server is attached to ${name} already.`, 'Detach it first.')
    }
    if (how.syn && host !== undefined) checkSyn(host)
    return await this.alone(async () => {
      const direct = this.openWay()
      const server = await DatagramServer.start({
        ...how,
        tenants,
        maxRunning,
        direct,
        onDirect: (report, nameOf) => this.hearDirect(report, nameOf),
        onEvent: (event: NetEvent, tenant: string) => this.logged(event, tenant),
        onFailure: (error: LatticeError) => {
          this.closeWay()
          warn(`datagrams are refused: ${error.message}`)
        },
      }).catch((thrown: unknown) => {
        this.closeWay()
        throw thrown
      })
      this.server = server
      this.index = server.addReplica({
        model: engine.model.id,
        start: (wire, tenant, answer) => this.answers.start(wire, tenant, answer),
      })
      if (share !== undefined) {
        this.hub = await JoinHub.listen(server, { path: share, tenants, warn }).catch(
          async (thrown: unknown) => {
            this.server = undefined
            await server.close()
            this.closeWay()
            throw thrown
          },
        )
      }
      this.timer = setInterval(() => this.sayLoad(), LOAD_MS)
      this.timer.unref()
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

  /** @throws LatticeError `net_refused` if it is attached to nothing */
  events(after: number): { events: (NetEvent & { name: string })[]; every: number; lost: number } {
    const { server } = this
    if (!server) throw refused('This server is attached to no interface.', 'Attach it first.')
    const { counters, events } = server.status()
    const lost = counters['events_lost'] ?? 0
    return { events: server.eventsAfter(after), every: events.every, lost }
  }

  /** Undefined while it is attached to nothing. */
  status(): DatagramStatus | undefined {
    return this.server?.status()
  }

  /** Refuses new requests; call it before the engine drains, `close` after. */
  refuse(): void {
    this.server?.refuse()
    this.hub?.refuse()
  }

  /** Lets what was answered arrive, then detaches. */
  async close(): Promise<void> {
    const { server, hub } = this
    this.news?.end()
    clearInterval(this.timer)
    server?.refuse()
    hub?.refuse()
    await hub?.drain()
    await server?.drain()
    await hub?.close()
    this.hub = undefined
    this.server = undefined
    await server?.close()
    this.closeWay()
  }

  /** Undefined if the ring thread cannot have a tokenizer, or the engine takes prompts of one. */
  private openWay():
    | { place: DirectWay['place']; modelPath: string; publishes: boolean }
    | undefined {
    const { engine, tokenizer, modelPath, publishes } = this.options
    if (modelPath === undefined || tokenizer.vocabSize > engine.model.vocabSize) return undefined
    const say = (news: DirectNews): void => this.server?.tell(news)
    const sink: DirectSink = {
      onStart: (id, cachedTokens) => say({ kind: 'direct-start', id, cachedTokens }),
      onToken: (id, token) => say({ kind: 'direct-token', id, token }),
      onFinish: (id, reason, outputTokens, error) => {
        const code = endCode(reason, error)
        if (error?.code === 'engine_stopped') this.setStopped()
        const why = code === 'failed' ? error?.message : undefined
        say({ kind: 'direct-end', id, code, outputTokens, ...(why !== undefined && { why }) })
      },
      onStopped: (error) => {
        this.setStopped()
        say({ kind: 'direct-stop', code: errorCode(error) })
      },
    }
    this.way = engine.direct?.(sink, tokenizer.eosTokens)
    return this.way && { place: this.way.place, modelPath, publishes }
  }

  private closeWay(): void {
    this.way?.close()
    this.way = undefined
  }

  private hearDirect(report: DirectReport, nameOf: (tenant: number) => string): void {
    if (report.kind === 'direct-abort') this.way?.abort(report.id)
    else if (report.kind === 'direct-computed') {
      this.news?.computed(report.wire, report.tokens, nameOf(report.wire.tenant))
    } else this.options.warn(failureLine(report.tenant, report.request, report.why))
  }

  /** With no load at all it would be given everything. */
  private setStopped(): void {
    this.server?.setReady(this.index, false)
  }

  /** A flood of decisions must not become a flood of lines. */
  private logged(event: NetEvent, tenant: string): void {
    const { log } = this.options
    if (!log) return
    const second = Math.floor(event.timeMs / 1000)
    if (second !== this.lines.second) {
      if (this.lines.count > LINES_MAX) log(`… and ${this.lines.count - LINES_MAX} more`)
      this.lines = { second, count: 0 }
    }
    if (++this.lines.count <= LINES_MAX) log(describeEvent(event, tenant))
  }

  /** What came another way than over datagrams counts too when the program chooses. */
  private sayLoad(): void {
    const { load = () => 0 } = this.options
    const others = Math.max(0, load() - this.answers.running - (this.way?.running() ?? 0))
    this.server?.setOtherLoad(this.index, others)
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
