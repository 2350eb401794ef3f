// Owns an interface's datagram path: the program in its driver, the ring thread behind it, and the
// replicas that answer. The program learns here who is there, what is free and where prefixes are.

import { LatticeError } from '../errors.ts'
import { type AttachedXdp, attachedXdp } from '../ffi/libbpf.ts'
import type { DirectNews, DirectOptions, DirectReport } from './direct-answers.ts'
import type { WireAnswer, WireRequest } from './exchange.ts'
import type { NetEvent } from './decisions.ts'
import { NetEvents } from './events.ts'
import { Egress, type TenantAccount } from './egress.ts'
import {
  Ingress,
  INGRESS_DEFAULTS,
  type IngressCounters,
  type SynLimits,
  type TenantUse,
} from './ingress.ts'
import { QUEUES_MAX, REPLICAS_MAX } from './ingress-maps.ts'
import {
  addressesOf,
  type CheckedInterface,
  checkInterface,
  type InterfaceChoice,
  lacking,
  type NetMode,
  reason,
  refused,
  taken,
} from './interface.ts'
import { Ring } from './ring.ts'
import type { RingLosses } from './ring-messages.ts'
import { chooseRing, type NetRing, type RingChoice } from './ring-choice.ts'
import type { DatagramTenant } from './tenants.ts'

/** What answers prompts: an engine here, or another process that has joined. */
export interface DatagramReplica {
  /** Name of its model. */
  readonly model: string
  /** Of its process, if that is not this one. */
  readonly process?: number
  /** Starts a request; returns what aborts it. Must not throw. */
  start(wire: WireRequest, tenant: string, answer: WireAnswer): () => void
}

export interface DatagramOptions extends InterfaceChoice {
  mode: NetMode
  /** Take the next best mode where the driver cannot do this one, instead of refusing. */
  allowGeneric: boolean
  busyPollBudget: number
  /** What puts prompts together; the native one if it can be loaded, unless given. */
  ring?: NetRing | undefined
  tenants: readonly DatagramTenant[]
  /** Requests at once, of all tenants together. */
  maxRunning: number
  /** That are remembered for 30 s, whether they run or not: 2,184 a second unless told. */
  requests?: number
  port: number
  /** Limits the new connections of a plain TCP port of this machine as well. */
  syn?: SynLimits | undefined
  /** One decision in so many is told of: a power of two; none unless given. */
  sampleEvery?: number
  /** A decision that is told of, with its tenant's name. */
  onEvent?: (event: NetEvent, tenant: string) => void
  /** What the first replica's prompts need to go past this thread. */
  direct?: Omit<DirectOptions, 'names' | 'route'> | undefined
  onDirect?: (report: DirectReport, tenant: (index: number) => string) => void
  /** The ring thread is gone: every HELLO is refused from now on. */
  onFailure: (error: LatticeError) => void
}

export interface DatagramStatus {
  interface: string
  /** Where the program is, asked of the kernel now. */
  attached: AttachedXdp | undefined
  /** Whether the driver writes into our memory itself, asked of the kernel at the start. */
  zeroCopy: boolean
  ring: RingChoice
  queues: readonly number[]
  port: number
  /** It answers for so many; 0 is for any, since it has none or more than the program knows. */
  addresses: number
  /** One end of a veth pair. */
  isPair: boolean
  /** Limits of plain connections, if there are any. */
  syn?: SynLimits | undefined
  /** Instructions that the verifier followed. */
  verified: number
  running: number
  counters: IngressCounters
  losses: RingLosses
  /** Decisions that were told of, and how often one is; 0 is never. */
  events: { count: number; every: number }
  tenants: (TenantUse & { index: number; name: string; sent: TenantAccount })[]
  replicas: ReplicaStatus[]
  failure: string | undefined
}

export interface ReplicaStatus {
  index: number
  model: string
  /** The process that answers; 0 is the owner of the interface itself. */
  process: number
  /** It takes new requests. */
  ready: boolean
  running: number
  /** Requests that came another way: over HTTP. */
  others: number
  prefixes: number
}

const SYNC_MS = 5_000
/** In so many steps all that is remembered is looked at every SYNC_MS. */
const EXPIRE_MS = 250
/** A client gets so long to take the rest of its answer. */
const FLUSH_MS = 5_000

interface Attached {
  detach: () => void
  ring: Ring
}

export class DatagramServer {
  readonly ingress: Ingress
  readonly egress: Egress
  /** Undefined if the program tells of nothing. */
  private readonly events: NetEvents | undefined
  private readonly options: DatagramOptions
  private readonly link: CheckedInterface
  private ring!: Ring
  private detach: () => void = () => {}
  private timers: readonly NodeJS.Timeout[] = []
  private failure: LatticeError | undefined
  private addresses = 0
  private readonly how: RingChoice
  private readonly names: ReadonlyMap<number, string>
  private readonly replicas: (DatagramReplica | undefined)[] = []
  /** By index, also of those that are gone. */
  private readonly models: string[] = []
  private refusing = false
  /** By route: aborts of what runs at a replica. */
  private readonly running = new Map<WireAnswer, number>()
  private readonly claimed = new Set<string>()
  /** Published prefixes: a bit for each replica that holds one. */
  private readonly prefixes = new Map<bigint, bigint>()

  private constructor(options: DatagramOptions, link: CheckedInterface) {
    this.options = options
    this.link = link
    this.how = chooseRing(options.ring)
    this.names = new Map(options.tenants.map(({ index, name }) => [index, name]))
    const { port, sampleEvery = 0, onEvent, requests = INGRESS_DEFAULTS.requests, syn } = options
    this.ingress = Ingress.load({ port, sampleEvery, requests, syn })
    if (sampleEvery > 0) {
      this.events = new NetEvents(this.ingress.object.map('events'), (event) => {
        onEvent?.(event, this.nameOf(event.tenant))
      })
    }
    this.ingress.setMaxRunning(options.maxRunning)
    this.egress = Egress.load(options.port)
    for (const tenant of options.tenants) {
      this.ingress.setTenant(tenant.index, tenant)
      if (tenant.egress) this.egress.setTenant(tenant.index, tenant.egress)
    }
    this.followAddresses()
    this.ingress.setQueues(link.queues)
  }

  /**
   * Opens the rings and attaches the program. Requests are refused until there is a replica.
   * @throws LatticeError `net_refused`, and as `Ingress` and `Ring` do; then nothing is attached
   */
  static async start(options: DatagramOptions): Promise<DatagramServer> {
    const server = new DatagramServer(options, checkInterface(options))
    try {
      const { ring, detach } = await server.attach()
      server.ring = ring
      server.detach = detach
    } catch (thrown) {
      server.events?.close()
      server.ingress.close()
      server.egress.close()
      throw thrown
    }
    server.timers = [
      setInterval(() => server.sync(), SYNC_MS),
      setInterval(() => server.expire(), EXPIRE_MS),
    ]
    for (const timer of server.timers) timer.unref()
    return server
  }

  /**
   * Lets a replica be chosen. Returns its index.
   * @throws LatticeError `net_refused` if there are as many as may be
   */
  addReplica(replica: DatagramReplica): number {
    if (this.refusing) throw refused('The server is shutting down.', 'Join again later.')
    const index = this.freeIndex(replica.model)
    this.replicas[index] = replica
    this.models[index] = replica.model
    this.ring.fds.forEach((fd, i) => {
      this.ingress.setRing(index * QUEUES_MAX + (this.link.queues[i] ?? 0), fd)
    })
    this.ingress.setOtherLoad(index, 0)
    this.ingress.setReplica(index, replica.model)
    return index
  }

  /** It is gone: what runs there ends, and nothing is sent to it any more. */
  removeReplica(index: number): void {
    this.ingress.setReplica(index, undefined)
    this.replicas[index] = undefined
    for (const [hash, holders] of this.prefixes) this.setHolders(hash, holders & ~bit(index))
    for (const [answer, route] of this.running) {
      if (route === index + 1) answer.end('replica_lost', NO_USAGE)
    }
  }

  /** Says whether a replica that is there takes new requests. */
  setReady(index: number, isReady: boolean): void {
    const model = this.replicas[index]?.model
    this.ingress.setReplica(index, isReady && !this.refusing ? model : undefined)
  }

  /** Says how many requests a replica has that came another way than over datagrams. */
  setOtherLoad(index: number, requests: number): void {
    this.ingress.setOtherLoad(index, requests)
  }

  /** Says whether a replica has a prefix in memory; the program prefers those that have. */
  publish(index: number, hash: bigint, isHeld: boolean): void {
    const holders = this.prefixes.get(hash) ?? 0n
    this.setHolders(hash, isHeld ? holders | bit(index) : holders & ~bit(index))
  }

  status(): DatagramStatus {
    const { link, options, ring, ingress, egress } = this
    const counters = ingress.counters()
    return {
      interface: link.name,
      attached: attachedXdp(link.index),
      zeroCopy: ring.zeroCopy,
      ring: this.how,
      queues: link.queues,
      port: options.port,
      addresses: this.addresses,
      isPair: link.isPair,
      syn: options.syn,
      verified: ingress.program.info().verified,
      running: ingress.running,
      counters,
      losses: ring.losses,
      events: { count: this.events?.count ?? 0, every: options.sampleEvery ?? 0 },
      tenants: options.tenants.map(({ index, name }) => {
        return { index, name, ...ingress.use(index), sent: egress.tenant(index) }
      }),
      replicas: this.replicas.flatMap((replica, index) => {
        if (!replica) return []
        const { model, process = 0 } = replica
        const prefixes = this.prefixes
          .values()
          .reduce((n, held) => n + (held & bit(index) ? 1 : 0), 0)
        return [{ index, model, process, prefixes, ...ingress.replica(index) }]
      }),
      failure: this.failure?.message,
    }
  }

  /** Passes on what the engine says of a prompt that went past this thread. */
  tell(news: DirectNews): void {
    this.ring.tell(news)
  }

  /** Decisions after a number, with their tenants' names, of the latest thousand. */
  eventsAfter(number: number): (NetEvent & { name: string })[] {
    const events = this.events?.after(number) ?? []
    return events.map((event) => ({ ...event, name: this.nameOf(event.tenant) }))
  }

  /** Refuses new requests; those that run go on. */
  refuse(): void {
    this.refusing = true
    this.replicas.forEach((_, index) => this.ingress.setReplica(index, undefined))
  }

  /** Refuses new requests; resolves when what was answered has arrived. */
  async drain(): Promise<void> {
    this.refuse()
    const { promise: late, resolve } = Promise.withResolvers<void>()
    const timer = setTimeout(resolve, FLUSH_MS)
    await Promise.race([this.ring.drain(), late])
    clearTimeout(timer)
  }

  /** Detaches the program; what runs is cut off. */
  async close(): Promise<void> {
    for (const timer of this.timers) clearInterval(timer)
    this.detach()
    await this.ring.close()
    this.events?.close()
    this.ingress.close()
    this.egress.close()
  }

  /** The program first: which mode it gets decides about the rings. */
  private async attach(): Promise<Attached> {
    const { mode, allowGeneric } = this.options
    const ladder: readonly NetMode[] = allowGeneric ? LADDER.slice(LADDER.indexOf(mode)) : [mode]
    let failure: unknown
    for (const step of ladder) {
      try {
        return await this.attachAs(step)
      } catch (thrown) {
        if (!isUnsupported(thrown)) throw this.explain(thrown, step)
        failure = thrown
      }
    }
    throw lacking(this.link, mode, failure)
  }

  private async attachAs(mode: NetMode): Promise<Attached> {
    const { link, options, ingress, egress } = this
    const keys = new Map(options.tenants.map(({ index, keys: pair }) => [index, pair]))
    const leave = egress.attach(link.name)
    let detach = leave
    try {
      const detachXdp = ingress.program.attachXdp(link.index, mode === 'generic' ? mode : 'native')
      detach = () => {
        detachXdp()
        leave()
      }
      const { index: ifindex, queues } = link
      const copy = mode === 'zerocopy' ? mode : 'copy'
      const { busyPollBudget, onDirect, requests: flows = INGRESS_DEFAULTS.requests } = options
      const direct = options.direct && { ...options.direct, route: 1, names: this.names }
      const ring = await Ring.open(
        { ifindex, queues, mode: copy, busyPollBudget, keys, direct, flows, ring: this.how.ring },
        {
          start: (wire, answer) => this.run(wire, answer),
          claimed: (tenant, request) => void this.claimed.add(`${tenant}:${request}`),
          finished: (tenant, request, used) => {
            this.claimed.delete(`${tenant}:${request}`)
            ingress.finish(tenant, request, used)
          },
          direct: (report) => onDirect?.(report, (tenant) => this.nameOf(tenant)),
          failed: (error) => this.fail(error),
        },
      )
      return { ring, detach }
    } catch (thrown) {
      detach()
      throw thrown
    }
  }

  private explain(thrown: unknown, mode: NetMode): unknown {
    if (!(thrown instanceof LatticeError) || thrown.code !== 'os_call_failed') return thrown
    const { name, index } = this.link
    const other = isBusy(thrown) ? attachedXdp(index) : undefined
    if (other && other.id !== this.ingress.program.info().id) return taken(name, other)
    const call = String(thrown.details['call'])
    const what = `The kernel refuses ${name} (${mode}, ${call}): ${reason(thrown)}.`
    const todo = isBusy(thrown)
      ? 'Another process has this queue: choose another with --queue, or end that process.'
      : '`dmesg` may say more.'
    return refused(what, todo, thrown)
  }

  private run(wire: WireRequest, answer: WireAnswer): () => void {
    const replica = this.replicas[wire.route - 1]
    if (!replica) {
      answer.end('no_replica', NO_USAGE)
      return () => {}
    }
    const watched: WireAnswer = {
      tokens: (ids, text) => answer.tokens(ids, text),
      end: (code, usage) => {
        if (this.running.delete(watched)) answer.end(code, usage)
      },
    }
    this.running.set(watched, wire.route)
    const abort = replica.start(wire, this.nameOf(wire.tenant), watched)
    return () => {
      this.running.delete(watched)
      abort()
    }
  }

  private nameOf(tenant: number): string {
    return this.names.get(tenant) ?? 'default'
  }

  /** Prompts may still be on their way to one that is gone: only its like may take its index. */
  private freeIndex(model: string): number {
    for (let index = 0; index < REPLICAS_MAX; index++) {
      if (this.replicas[index]) continue
      const isAnyones =
        this.models[index] === undefined || this.ingress.replica(index).running === 0
      if (isAnyones || this.models[index] === model) return index
    }
    throw refused(`${REPLICAS_MAX} replicas are there already.`, 'Let one of them go first.')
  }

  private setHolders(hash: bigint, holders: bigint): void {
    if (holders === 0n) this.prefixes.delete(hash)
    else this.prefixes.set(hash, holders)
    this.ingress.publish(hash, holders)
  }

  private sync(): void {
    this.ingress.syncClock()
    this.followAddresses()
  }

  /** A part of what is remembered at a time: all of it could hold up the thread for long. */
  private expire(): void {
    const isClaimed = (tenant: number, request: bigint) => this.claimed.has(`${tenant}:${request}`)
    this.ingress.expire(isClaimed, undefined, SYNC_MS / EXPIRE_MS)
  }

  private followAddresses(): void {
    const addresses = addressesOf(this.link.name)
    this.addresses = addresses.length
    this.ingress.setAddresses(addresses)
  }

  private fail(error: LatticeError): void {
    this.failure = error
    this.refuse()
    // Nobody is left who would finish them.
    this.claimed.clear()
    this.options.onFailure(error)
  }
}

/** Each is what the next best comes after. */
const LADDER: readonly NetMode[] = ['zerocopy', 'native', 'generic']
const NO_USAGE = { promptTokens: 0, cachedTokens: 0, outputTokens: 0 }
const EBUSY = 16
const EEXIST = 17
const EINVAL = 22
const ERANGE = 34
const EOPNOTSUPP = 95

/** Of a mode; drivers have several words for frames that are too large for theirs. */
function isUnsupported(thrown: unknown): boolean {
  const { call, errno } = thrown instanceof LatticeError ? thrown.details : {}
  if (call === 'bpf_link_create') return [EINVAL, ERANGE, EOPNOTSUPP].includes(Number(errno))
  return call === 'bind' && errno === EOPNOTSUPP
}

function isBusy({ details }: LatticeError): boolean {
  return details['errno'] === EBUSY || details['errno'] === EEXIST
}

function bit(index: number): bigint {
  return 1n << BigInt(index)
}
