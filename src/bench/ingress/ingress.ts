// Owns `lattice bench ingress`: what an answer of the program in the driver takes, against UDP, TCP
// and our own HTTP server, in one run on two hosts on veth. On veth the program runs on the CPU
// that sends: with an XDP client, the whole round trip is one core's work.

import { setTimeout as sleep } from 'node:timers/promises'
import { PROTOCOL_PORT } from '../../net/protocol.ts'
import { type Delivery, median, runDelivery } from './delivery.ts'
import { HTTP_PORT, KEY, TENANT } from './host.ts'
import { type Measured, World } from './world.ts'

export interface IngressBenchOptions {
  /** Round trips of a closed loop. */
  requests: number
  rates: readonly number[]
  /** Of each rate, and of the flood. */
  seconds: number
  /** A model's file, for its tokenizer; without one a byte is a token. */
  model?: string | undefined
  onProgress: (line: string) => void
}

export interface RoundTrips extends Measured {
  name: string
  prompt_bytes: number
  /** Requests a second; 0 is one after the other. */
  rate: number
}

export interface Stalls {
  p50_itl_ms: number
  p99_itl_ms: number
}

export interface IngressBenchReport {
  round_trips: RoundTrips[]
  flood: { refusals_per_s_per_core: number; http_refusals_per_s_per_core: number; ratio: number }
  streams: FloodedStreams
  first_token: Record<
    'datagram' | 'datagram_busy_poll' | 'http',
    { p50_ttft_ms: number; p99_ttft_ms: number; server_cpu_us: number }
  >
  delivery: Delivery[]
}

/** Medians over rounds that take turns. */
export interface FloodedStreams {
  quiet: Stalls
  /** The flood's core is as busy, but nothing is sent. */
  hogged: Stalls
  flooded: Stalls
  /** Of p99 under the flood to p99 beside the hog: the median of the rounds' own. */
  ratio: number
  refused_hellos_per_s: number
}

const PEER_PORT = 9000
const KINDS = ['udp-spin', 'tcp-spin', 'udp-sleep', 'tcp-sleep'] as const
const [KIB, MIB] = [1 << 10, 1 << 20]
const STREAMS = 8
const STEP_MS = 10
const STREAM_ROUNDS = 5
const BUSY_POLL_BUDGET = 64

/** @throws LatticeError `backend_unavailable` without root or gcc */
export async function runIngressBench(options: IngressBenchOptions): Promise<IngressBenchReport> {
  using world = new World()
  using _interrupted = onInterrupt(() => world[Symbol.dispose]())
  await world.client.call('detach')
  await world.server.call('set', { full: true })
  await world.server.call('http')
  const bench = new Bench(world, options)
  const trips = [
    ...(await bench.closedLoops()),
    ...(await bench.peers(0)),
    ...(await bench.atRates()),
  ]
  const flood = await bench.refusals()
  const streams = await bench.streams()
  const first = await bench.firstTokens()
  const { model, onProgress } = options
  const how = { model, onProgress, prompts: 200, rounds: 8, rate: 500 }
  const delivery = await runDelivery(world, how)
  return { round_trips: trips, flood, streams, first_token: first, delivery }
}

/** Who presses Ctrl-C finds the machine as it was; exit code 130, as docs/cli.md has it. */
function onInterrupt(clean: () => void): Disposable {
  const interrupt = (): void => {
    clean()
    process.exit(130)
  }
  process.once('SIGINT', interrupt)
  return { [Symbol.dispose]: () => process.off('SIGINT', interrupt) }
}

class Bench {
  private readonly world: World
  private readonly options: IngressBenchOptions
  private readonly macs: [string, string]

  constructor(world: World, options: IngressBenchOptions) {
    this.world = world
    this.options = options
    this.macs = [world.client.mac, world.server.mac]
  }

  async closedLoops(): Promise<RoundTrips[]> {
    const trips: RoundTrips[] = []
    for (const kind of ['xdp-spin', 'udp-spin', 'udp-sleep'] as const) {
      for (const tenant of ['refused', 'granted'] as const) {
        for (const bytes of [KIB, MIB]) trips.push(await this.hello(kind, tenant, bytes, 0))
      }
    }
    for (const kind of ['xdp-spin', 'udp-spin', 'udp-sleep']) trips.push(await this.turned(kind))
    for (const bytes of [KIB, MIB]) trips.push(await this.http(bytes, 0))
    return trips
  }

  /** HELLOs that come back as they are: what any answer from the driver takes at least. */
  private async turned(kind: string): Promise<RoundTrips> {
    const { client, server } = this.world
    await server.call('turn', server.link)
    await client.call('detach')
    if (kind !== 'xdp-spin') await client.call('pass', client.link)
    const asked = await this.ask(kind, 'granted', KIB, this.count(0), 0)
    return this.told({ ...asked, name: `turned ${kind}`, prompt_bytes: KIB, rate: 0 })
  }

  /** Echoes of 96 bytes: no decision at all, so what a server in user space takes at least. */
  async peers(rate: number): Promise<RoundTrips[]> {
    const trips: RoundTrips[] = []
    for (const kind of rate === 0 ? KINDS : (['udp-sleep', 'tcp-sleep'] as const)) {
      const stop = await this.world.peer(kind, PEER_PORT)
      const { address } = this.world.server
      const asked = await this.world.measure(
        'ask',
        kind,
        address,
        PEER_PORT,
        this.count(rate),
        rate,
      )
      trips.push(this.told({ ...asked, name: `echo ${kind}`, prompt_bytes: 0, rate }))
      await stop()
    }
    return trips
  }

  async atRates(): Promise<RoundTrips[]> {
    const trips: RoundTrips[] = []
    for (const rate of this.options.rates) {
      trips.push(await this.hello('xdp-spin', 'refused', KIB, rate))
      trips.push(await this.hello('xdp-spin', 'granted', KIB, rate))
      trips.push(await this.hello('udp-sleep', 'refused', KIB, rate))
      trips.push(...(await this.peers(rate)))
      trips.push(await this.http(KIB, rate))
    }
    return trips
  }

  async refusals(): Promise<IngressBenchReport['flood']> {
    await this.decide('refused', KIB, true)
    const { wall_ns: nsOfFlood } = await this.flood(this.options.seconds * 1000)
    const cpu = await this.world.server.call('cpu')
    const count = Math.min(this.options.requests, 2000)
    await this.world.measure(
      'http',
      'tcp-sleep',
      this.world.server.address,
      HTTP_PORT,
      count,
      0,
      4096,
    )
    // With the tenth that warms up.
    const nsOfHttp = ((await this.world.server.call('cpu')) - cpu) / (count * 1.1)
    return {
      refusals_per_s_per_core: 1e9 / nsOfFlood,
      http_refusals_per_s_per_core: 1e9 / nsOfHttp,
      ratio: nsOfHttp / nsOfFlood,
    }
  }

  /**
   * The streams' client shares the server's core, so that the flood has one to itself, and on it
   * the interfaces' kernel threads go first: else the flood's sender would be in the way of what
   * is a card's own work, for as long as the scheduler lets it.
   */
  async streams(): Promise<FloodedStreams> {
    const { server, client } = this.world
    await server.call('set', { full: false, stepMs: STEP_MS })
    await server.call('datagrams', server.link)
    const ms = this.options.seconds * 1000
    const tokens = Math.ceil(ms / STEP_MS)
    const reader = this.world.reader()
    const read = async () => stallsOf(await reader.call('streams', server.address, STREAMS, tokens))
    const quiet: Stalls[] = []
    const hogged: Stalls[] = []
    const flooded: Stalls[] = []
    const ns: number[] = []
    try {
      for (let round = 0; round < STREAM_ROUNDS; round++) {
        await client.call('detach')
        await client.call('pass', client.link)
        await server.call('interrupts', server.link, client.cpu)
        await client.call('interrupts', client.link, client.cpu)
        quiet.push(await read())
        const hogging = this.world.measure('hog', 'cpu', '-', 0, ms + 500, 0)
        await sleep(200)
        hogged.push(await read())
        await hogging
        await client.call('detach')
        const flooding = this.flood(ms + 500)
        await sleep(100)
        await client.call('interrupts', client.link, client.cpu)
        await sleep(100)
        flooded.push(await read())
        ns.push((await flooding).wall_ns)
      }
    } finally {
      reader.end()
      await client.call('detach')
      await client.call('pass', client.link)
    }
    const ratios = flooded.map(({ p99_itl_ms: p99 }, i) => p99 / (hogged[i]?.p99_itl_ms ?? NaN))
    return {
      quiet: middle(quiet),
      hogged: middle(hogged),
      flooded: middle(flooded),
      ratio: median(ratios),
      refused_hellos_per_s: 1e9 / median(ns),
    }
  }

  async firstTokens(): Promise<IngressBenchReport['first_token']> {
    const { server, client } = this.world
    await server.call('set', { stepMs: 0 })
    const measure = async (kind: 'datagram' | 'http') => {
      await client.call('firstTokens', kind, server.address, 4096, 300)
      const before = await server.call('cpu')
      const times = await client.call('firstTokens', kind, server.address, 4096, 500)
      const cpu = (await server.call('cpu')) - before
      const sorted = times.toSorted((a, b) => a - b)
      return {
        p50_ttft_ms: at(sorted, 0.5),
        p99_ttft_ms: at(sorted, 0.99),
        server_cpu_us: cpu / 500 / 1000,
      }
    }
    const datagram = await measure('datagram')
    const http = await measure('http')
    await server.call('datagrams', server.link, BUSY_POLL_BUDGET)
    const busy = await measure('datagram')
    return { datagram, datagram_busy_poll: busy, http }
  }

  private async hello(
    kind: 'xdp-spin' | 'udp-spin' | 'udp-sleep',
    tenant: keyof typeof TENANT,
    bytes: number,
    rate: number,
  ): Promise<RoundTrips> {
    const isXdp = kind === 'xdp-spin'
    await this.decide(tenant, bytes, isXdp)
    const asked = await this.ask(kind, tenant, bytes, this.count(rate), rate)
    const name = `${tenant === 'refused' ? 'REJECT' : 'GRANT'} ${kind}`
    return this.told({ ...asked, name, prompt_bytes: bytes, rate })
  }

  private async http(bytes: number, rate: number): Promise<RoundTrips> {
    // A server in one thread: a tenth of the requests is as good, and faster rates only queue.
    const most = Math.max(20, Math.ceil(this.options.requests / (bytes > KIB ? 100 : 10)))
    const count = Math.min(most, this.count(rate))
    const { address } = this.world.server
    const asked = await this.world.measure(
      'http',
      'tcp-sleep',
      address,
      HTTP_PORT,
      count,
      rate,
      bytes,
    )
    return this.told({ ...asked, name: 'HTTP 429', prompt_bytes: bytes, rate })
  }

  /** A fresh program; the tenant to be refused has spent what it had. */
  private async decide(tenant: keyof typeof TENANT, bytes: number, isXdp: boolean): Promise<void> {
    const { client, server } = this.world
    await server.call('decide', server.link, this.options.requests * 2)
    await client.call('detach')
    await client.call('pass', client.link)
    if (tenant === 'refused') {
      await this.ask('udp-sleep', tenant, 64 * KIB, 30, 0)
      await this.ask('udp-sleep', tenant, Math.min(bytes, KIB), 100, 0)
    }
    if (isXdp) await client.call('detach')
  }

  private ask(
    kind: string,
    tenant: keyof typeof TENANT,
    bytes: number,
    count: number,
    rate: number,
  ): Promise<Measured> {
    return this.world.measure(
      ...['hello', kind, this.world.server.address, PROTOCOL_PORT, count, rate],
      ...[TENANT[tenant], Buffer.from(KEY).toString('hex'), bytes, ...this.macs],
    )
  }

  private flood(ms: number): Promise<Measured> {
    return this.world.measure(
      ...['flood', 'xdp', this.world.server.address, PROTOCOL_PORT, ms, 0],
      ...[TENANT.refused, Buffer.from(KEY).toString('hex'), MIB, ...this.macs],
    )
  }

  private count(rate: number): number {
    const { requests, seconds } = this.options
    return rate === 0 ? requests : Math.min(requests, Math.max(3, Math.ceil(rate * seconds)))
  }

  private told(trips: RoundTrips): RoundTrips {
    const { name, prompt_bytes: bytes, rate, p50_us: p50, p99_us: p99 } = trips
    this.options.onProgress(`${name}, ${bytes} bytes, ${rate}/s: p50 ${p50} µs, p99 ${p99} µs`)
    return trips
  }
}

function stallsOf(gaps: readonly number[]): Stalls {
  const sorted = gaps.toSorted((a, b) => a - b)
  return { p50_itl_ms: at(sorted, 0.5), p99_itl_ms: at(sorted, 0.99) }
}

function middle(all: readonly Stalls[]): Stalls {
  return {
    p50_itl_ms: median(all.map(({ p50_itl_ms: p50 }) => p50)),
    p99_itl_ms: median(all.map(({ p99_itl_ms: p99 }) => p99)),
  }
}

function at(sorted: readonly number[], quantile: number): number {
  return sorted[Math.floor((sorted.length - 1) * quantile)] ?? NaN
}
