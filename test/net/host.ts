// Owns one host of a test network: a process in a network namespace that does what the test asks of
// it by messages. A test starts it through namespaces.ts.

import { createHash } from 'node:crypto'
import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { once } from 'node:events'
import { connect, createServer } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Engine, SequenceRequest } from '../../src/engine/api.ts'
import { EngineClient } from '../../src/engine/client.ts'
import { ATTACH, attachedPrograms } from '../../src/ffi/bpf-link.ts'
import { BpfObject } from '../../src/ffi/libbpf.ts'
import { interfaceIndex, XdpSocket } from '../../src/ffi/xdp-socket.ts'
import {
  type ClientOptions,
  type GenerateOptions,
  type GenerateResult,
  LatticeClient,
} from '../../src/net/client.ts'
import type { ClientExchange, ClientPrompt } from '../../src/net/client-exchange.ts'
import type { LatticeError } from '../../src/errors.ts'
import { answerCalls } from '../../src/bench/remote-calls.ts'
import { Ingress } from '../../src/net/ingress.ts'
import { JoinedReplica } from '../../src/net/joined-replica.ts'
import { NetService } from '../../src/net/net-service.ts'
import type { NetRing } from '../../src/net/ring-choice.ts'
import type { DatagramTenant } from '../../src/net/tenants.ts'
import { FakeEngine } from '../support/fake-engine.ts'
import { fakeTokenizer } from '../support/fake-tokenizer.ts'
import { http } from './http.ts'
import { runMutations } from './mutations.ts'
import { relay, type World } from './relay.ts'
import { openRouter } from './router.ts'

/** What an answer came to, or how it failed. */
export interface Asked {
  text: string
  tokens: number
  reason?: string
  usage?: { promptTokens: number; cachedTokens: number; outputTokens: number }
  /** Code of the error, its text, and the server's code in it. */
  error?: string
  message?: string
  code?: unknown
}

/** What an engine is to be. */
export interface EngineChoice {
  stepMs?: number
  /** The answer is this text so often, then the prompt's length. */
  reply: { text: string; times: number }
  /** Instead of the fake engine a real one that computes nothing, with so large a prefix cache. */
  prefixCacheBytes?: number
  /** Of that engine; 8,192 tokens unless told. */
  contextLength?: number
}

/** What a server host is to be. */
export interface ServeOptions extends EngineChoice {
  interface: string
  tenants: DatagramTenant[]
  /** Where other hosts join. */
  share?: string
  mode?: 'native' | 'generic' | 'zerocopy'
  maxRunning?: number
  force?: boolean
  allowGeneric?: boolean
  ring?: NetRing
}

/** A token is a byte and has 64 bytes in memory: a prompt of 4 KiB has 256 KiB in the cache. */
function cachingEngine(prefixCacheBytes: number, contextLength: number): Promise<Engine> {
  const kv = { layers: 1, rowBytes: 32, pageBytes: 4096 }
  const { vocabSize } = fakeTokenizer()
  const maxSequences = 4
  const kvBytes = 2 * prefixCacheBytes + maxSequences * (contextLength + 64) * 64
  const memory = { kvBytes, prefixCacheBytes, prefixEviction: 'lru' as const }
  const limits = { contextLength, maxSequences, stepTokens: 512 }
  return EngineClient.start(
    { backend: { kind: 'null', vocab: vocabSize, kv }, ...limits, ...memory },
    { id: 'null', architecture: 'none', contextLength, vocabSize },
    { sequences: 100, contextLength },
  )
}

async function openEngine(choice: EngineChoice): Promise<Engine> {
  const { prefixCacheBytes, contextLength = 8192, stepMs = 0, reply } = choice
  if (prefixCacheBytes !== undefined) return await cachingEngine(prefixCacheBytes, contextLength)
  const answer = ({ prompt }: SequenceRequest) => reply.text.repeat(reply.times) + prompt.length
  return new FakeEngine({ contextLength: 1 << 21, stepMs, reply: answer })
}

const warn = (line: string): void => void process.stderr.write(`${line}\n`)

/** What this process holds of the kernel's. */
interface Held {
  descriptors: number
  bpfMappings: number
  ringMappings: number
}

function held(): Held {
  const mappings = readFileSync('/proc/self/maps', 'utf8').split('\n')
  const count = (name: string) => mappings.filter((line) => line.includes(name)).length
  return {
    descriptors: readdirSync('/proc/self/fd').length,
    bpfMappings: count('bpf-map'),
    ringMappings: count('socket:'),
  }
}

const DETACHED = { queue: undefined, busyPollBudget: 0, port: 7411 }

let service: NetService | undefined
let engine: Engine | undefined
let joined: JoinedReplica | undefined
let otherLoad = 0
let routed = (): number => 0
/** Requests of `ask` that have heard something. */
let hearing = 0
const reserved: { exchange: ClientExchange; known: ClientPrompt }[] = []

/** What a test can ask for. Each survives a message between processes. */
export const COMMANDS = {
  /** XDP_TX reaches a veth only if it has a program of its own. */
  pass(name: string): void {
    const object = new BpfObject(readFileSync(new URL('../../bpf/testing.o', import.meta.url)))
    object.program('pass').attachXdp(interfaceIndex(name), 'native')
  },

  async serve({ tenants, share, maxRunning = 1000, ...options }: ServeOptions) {
    engine = await openEngine(options)
    const load = (): number => otherLoad
    const parts = { engine, tokenizer: fakeTokenizer(), template: undefined, warn, share, load }
    const publishes = options.prefixCacheBytes !== undefined
    service ??= new NetService({ ...parts, publishes, tenants, maxRunning })
    return await service.attach({
      ...DETACHED,
      name: options.interface,
      force: options.force ?? false,
      mode: options.mode ?? 'native',
      allowGeneric: options.allowGeneric ?? false,
      ring: options.ring,
    })
  },

  /** Joins the host that shares this socket, as another engine behind its interface. */
  async join(path: string, choice: EngineChoice): Promise<void> {
    const own = await openEngine(choice)
    engine = own
    const load = (): number => otherLoad
    const parts = { engine, tokenizer: fakeTokenizer(), template: undefined, warn, load }
    joined = await JoinedReplica.join({
      ...parts,
      path,
      publishes: choice.prefixCacheBytes !== undefined,
    })
  },

  /** As if so many requests had come over HTTP. */
  setOtherLoad(requests: number): void {
    otherLoad = requests
  },

  pid: () => process.pid,

  hearing: () => hearing,

  /** Attaches and detaches one program so often. What is held before and after. */
  cycle(name: string, times: number): { before: Held; after: Held } {
    const once = (count: number): void => {
      const ingress = Ingress.load()
      for (let i = 0; i < count; i++) {
        ingress.program.attachXdp(interfaceIndex(name), 'native')()
        if (i % 50 === 0) Ingress.load().close()
      }
      ingress.close()
    }
    // The first time libraries are loaded.
    once(1)
    const before = held()
    once(times)
    return { before, after: held() }
  },

  /** Mutated packets for the ingress program, by BPF_PROG_TEST_RUN: none is sent. */
  mutate(name: string, options: { seed: number; packets: number }) {
    const ingress = Ingress.load()
    const ring = new XdpSocket(interfaceIndex(name), 0)
    const report = runMutations(ingress, ring.fd, options)
    const counters = ingress.counters()
    const use = ingress.use(0)
    ring.close()
    ingress.close()
    return { ...report, counters, use }
  },

  /** The whole path: program, rings, thread. */
  async cycleServing(tenants: DatagramTenant[], name: string, times: number) {
    const serving = new FakeEngine()
    const warn = (): void => {}
    const parts = { engine: serving, tokenizer: fakeTokenizer(), template: undefined, warn }
    const net = new NetService({ ...parts, tenants, maxRunning: 10, publishes: false })
    const how = { ...DETACHED, name, force: false, mode: 'native', allowGeneric: false } as const
    const once = async (): Promise<void> => {
      await net.attach(how)
      await net.detach()
    }
    await once()
    await once()
    const before = held()
    for (let i = 0; i < times; i++) await once()
    return { before, after: held() }
  },

  /** If it is attached. */
  detach: () => (service?.status() ? service.detach() : undefined),

  status: () => service?.status(),

  /** What it does every few seconds. */
  sync(): void {
    ;(service as unknown as { server?: { sync(): void } }).server?.sync()
  },

  /** How many programs see what an interface sends. */
  accountants: (name: string) => attachedPrograms(interfaceIndex(name), ATTACH.tcxEgress),

  /** How many aborts the engine has seen, and what runs there. */
  async engine() {
    const snapshot = await engine?.snapshot()
    const fake = engine instanceof FakeEngine ? engine : undefined
    const { running, prefixQueries, prefixHits } = snapshot ?? {}
    const [aborts, asked] = [fake?.aborts.length, fake?.requests.length]
    return { aborts, asked, running, prefixQueries, prefixHits }
  },

  /** Lets one replica be chosen, or all of so many. */
  only(replicas: number, index: number | undefined): void {
    for (let i = 0; i < replicas; i++) {
      service?.['server']?.setReady(i, index === undefined || i === index)
    }
  },

  /** How much of a prompt is in the engine's memory, to a whole number of `grain` tokens. */
  async cachedTokens(tenant: string, prompt: string, grain: number): Promise<number> {
    const tokens = fakeTokenizer().encode(prompt, { addSpecial: true, parseSpecial: false })
    const count = Math.floor(tokens.length / grain)
    const prefixes = Array.from({ length: count }, (_, i) => {
      return { id: String(i + 1), length: (i + 1) * grain }
    })
    const cached = await engine?.ask({ kind: 'watch', tenant, tokens, prefixes })
    return grain * Math.max(0, ...(cached ?? []).map(Number))
  },

  /** Asks for room for a prompt; returns what `finish` sends it by. */
  async reserve(client: ClientOptions, prompt: string, maxTokens: number) {
    const bytes = Buffer.from(prompt)
    const known = { bytes, isChat: false, maxTokens }
    const exchange = await new LatticeClient(client).reserve(
      { promptBytes: bytes.length, maxTokens },
      known,
    )
    reserved.push({ exchange, known })
    return { id: reserved.length - 1, route: exchange.route }
  },

  async finish(id: number): Promise<GenerateResult> {
    const { exchange, known } = reserved[id]!
    delete reserved[id]
    const answer = exchange.run(known)
    for (;;) {
      const { done, value } = await answer.next()
      if (!done) continue
      exchange.close()
      return value
    }
  },

  /** CPU time of this process so far, in µs. */
  cpuUs(): number {
    const { user, system } = process.cpuUsage()
    return user + system
  },

  /** The same request so often, this many at a time; how long each took in ms. */
  async askMany(client: ClientOptions, request: GenerateOptions, times: number, atOnce: number) {
    const durations: number[] = []
    const asking = new LatticeClient(client)
    const worker = async (): Promise<void> => {
      while (durations.length + atOnce <= times) {
        const started = performance.now()
        for await (const _delta of asking.generate(request)) continue
        durations.push(performance.now() - started)
      }
    }
    await Promise.all(Array.from({ length: atOnce }, worker))
    return durations
  },

  async stop(): Promise<void> {
    await service?.close()
    await joined?.close()
    await engine?.close()
  },

  /** @param cancelAfter aborts once so many characters have come */
  async ask(
    client: ClientOptions,
    request: GenerateOptions,
    cancelAfter = Infinity,
  ): Promise<Asked> {
    const asked: Asked = { text: '', tokens: 0 }
    const abort = new AbortController()
    try {
      const answer = new LatticeClient(client).generate({ ...request, signal: abort.signal })
      for (;;) {
        const { done, value } = await answer.next()
        if (done) {
          const { reason, ...usage } = value
          return { ...asked, reason, usage }
        }
        if (asked.tokens === 0) hearing++
        asked.text += value.text
        asked.tokens += value.tokens.length
        if (asked.text.length >= cancelAfter) abort.abort()
      }
    } catch (thrown) {
      const { code, details, message } = thrown as LatticeError
      return { ...asked, error: code ?? String(thrown), message, code: details?.['code'] }
    }
  },

  /** A bad network between a client and a server: a port of this host that leads there. */
  relay: (world: World, address: string, port: number) => relay(world, address, port),

  /** This host hands on what is for others, whichever way it came. */
  forward(): void {
    for (const name of ['ipv4/ip_forward', 'ipv6/conf/all/forwarding']) {
      writeFileSync(`/proc/sys/net/${name}`, '1')
    }
    for (const name of ['all', 'default']) {
      writeFileSync(`/proc/sys/net/ipv4/conf/${name}/rp_filter`, '0')
    }
  },

  /** A bad router: what is routed into this interface is routed on, or is not. */
  badly(name: string, world: World): void {
    routed = openRouter(name, world)
  },

  /** How many packets it has seen. */
  routed: () => routed(),

  /** A TCP server that answers what it was sent with its hash. */
  listen(port: number): Promise<void> {
    const server = createServer({ allowHalfOpen: true }, (socket) => {
      const hash = createHash('sha256')
      socket.on('data', (bytes) => hash.update(bytes))
      socket.on('end', () => socket.end(hash.digest('hex')))
    })
    return new Promise((resolve) => server.listen(port, resolve))
  },

  /** How many of so many connections to a TCP port are made within two tries of each. */
  async connects(address: string, port: number, times: number): Promise<number> {
    const made = await Promise.all(
      Array.from({ length: times }, async () => {
        const socket = connect(port, address)
        // A SYN that is dropped comes again after a second.
        const late = sleep(1500, 0)
        const count = await Promise.race([once(socket, 'connect').then(() => 1), late])
        socket.destroy()
        return count
      }),
    )
    return made.reduce<number>((sum, count) => sum + count, 0)
  },

  /** One HTTP request, as a client that may wait to be told to go on, or may leave. */
  http,

  /** Sends bytes over TCP; returns the hash that came back. */
  async transfer(address: string, port: number, bytes: Uint8Array): Promise<string> {
    const socket = connect(port, address)
    socket.end(bytes)
    let answer = ''
    for await (const chunk of socket) answer += String(chunk)
    return answer
  },
}

if (import.meta.main) answerCalls(COMMANDS)
