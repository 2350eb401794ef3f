// Owns one end of the bench in its namespace: the server that decides, serves datagrams or refuses
// over HTTP, or a client that reads streams. It does what the bench tells it by messages.

import { execFileSync } from 'node:child_process'
import { readFileSync, writeFileSync } from 'node:fs'
import { Agent, request as httpRequest } from 'node:http'
import { text } from 'node:stream/consumers'
import { setTimeout as sleep } from 'node:timers/promises'
import { BpfObject } from '../../ffi/libbpf.ts'
import { interfaceIndex } from '../../ffi/xdp-socket.ts'
import { LatticeClient } from '../../net/client.ts'
import { Ingress } from '../../net/ingress.ts'
import { NetService } from '../../net/net-service.ts'
import { PROTOCOL_PORT } from '../../net/protocol.ts'
import type { NetRing } from '../../net/ring-choice.ts'
import type { Engine } from '../../engine/api.ts'
import { openModel } from '../../model/load.ts'
import { startServer } from '../../server/server.ts'
import { loadTokenizer } from '../../text/load.ts'
import type { Tokenizer } from '../../text/tokenizer.ts'
import { BenchEngine, BYTES } from './engine.ts'
import { cpuTimes, cpuTimesBefore, napiThreads, QueueEngine } from './queue.ts'
import { answerCalls } from '../remote-calls.ts'

export const TENANT = { granted: 1, refused: 2 } as const
export const KEY = new Uint8Array(16).fill(3)
export const HTTP_PORT = 9100
export const QUEUE_PORT = 9101
const keys = [KEY, KEY] as const
const PASS_TRIES = 20
const PASS_WAIT_MS = 50

let ingress: Ingress | undefined
let detach: (() => void) | undefined
let service: NetService | undefined
const engine = new BenchEngine()

let queue: QueueEngine | undefined
let kernelThreads: number[] = []

export const COMMANDS = {
  /**
   * A veth takes what XDP sends only if it has a program of its own.
   * @param cpu takes frames from the driver in a kernel thread there, if given
   */
  async pass(name: string, cpu?: number): Promise<void> {
    detach?.()
    detach = undefined
    const before = napiThreads(name)
    const testing = readFileSync(new URL('../../../bpf/testing.o', import.meta.url))
    const object = new BpfObject(testing)
    // A process that has just ended may keep its own program there for a moment.
    for (let tries = 0; detach === undefined; tries++) {
      try {
        detach = object.program('pass').attachXdp(interfaceIndex(name), 'native')
      } catch (thrown) {
        if (tries === PASS_TRIES) throw thrown
        await sleep(PASS_WAIT_MS)
      }
    }
    if (cpu !== undefined) inThreads(name, cpu, before)
  },

  detach(): void {
    detach?.()
    detach = undefined
  },

  /** A program that sends everything back and decides nothing. */
  turn(name: string): void {
    detach?.()
    ingress?.close()
    ingress = undefined
    const testing = readFileSync(new URL('../../../bpf/testing.o', import.meta.url))
    detach = new BpfObject(testing).program('turn').attachXdp(interfaceIndex(name), 'native')
  },

  /** The program alone, with a replica that nobody is behind; what was granted is forgotten. */
  decide(name: string, requests?: number): void {
    detach?.()
    ingress?.close()
    ingress = Ingress.load(requests === undefined ? {} : { requests })
    ingress.setMaxRunning(1 << 30)
    ingress.setReplica(0, 'bench')
    const maxRunning = 1 << 30
    const rich = { keys, tokensPerSecond: 1e9, burstTokens: 1e9, maxRunning }
    ingress.setTenant(TENANT.granted, rich)
    ingress.setTenant(TENANT.refused, { ...rich, tokensPerSecond: 10, burstTokens: 300_000 })
    detach = ingress.program.attachXdp(interfaceIndex(name), 'native')
  },

  async datagrams(name: string, busyPollBudget = 0): Promise<void> {
    detach?.()
    detach = undefined
    await service?.close()
    service = serviceFor(engine, BYTES)
    await attach(name, busyPollBudget)
  },

  async http(): Promise<void> {
    const at = { host: '0.0.0.0', port: HTTP_PORT }
    await startServer({ engine, tokenizer: BYTES, template: undefined, ...at })
  },

  /**
   * A real engine's queue at the end of both ways.
   * @param cpu where the interface's kernel threads run
   * @param model a file whose tokenizer it is; '' is none
   */
  async queue(name: string, cpu: number, model: string, ring: NetRing): Promise<void> {
    detach?.()
    detach = undefined
    await service?.close()
    const tokenizer = model === '' ? BYTES : loadTokenizer(openModel(model))
    if (!queue) {
      queue = await QueueEngine.start(tokenizer.vocabSize)
      const at = { host: '0.0.0.0', port: QUEUE_PORT }
      await startServer({ engine: queue, tokenizer, template: undefined, ...at })
    }
    service = serviceFor(queue, tokenizer, model === '' ? undefined : model)
    const before = napiThreads(name)
    await attach(name, 0, ring)
    kernelThreads = inThreads(name, cpu, before)
  },

  /**
   * Kernel threads take an interface's frames from its driver, before all else on their core: as
   * a card's interrupts would. Only while a program is attached.
   */
  interrupts(name: string, cpu: number): void {
    for (const id of inThreads(name, cpu, [])) execFileSync('chrt', ['-f', '-p', '50', `${id}`])
  },

  /** CPU time of each thread so far, in ns, those of the interface included. */
  times: () => cpuTimesBefore(kernelThreads),

  /** The same, when so many prompts lie in the scheduler's queue. */
  async queued(count: number): Promise<Record<string, number>> {
    await queue?.queued(count)
    return cpuTimes(kernelThreads)
  },

  release: () => queue?.release(),

  set(options: { full?: boolean; stepMs?: number }): void {
    Object.assign(engine, options)
  },

  /** CPU time of all threads so far, in ns. */
  cpu(): number {
    const { user, system } = process.cpuUsage()
    return (user + system) * 1000
  },

  counters: () => service?.status()?.counters ?? ingress?.counters(),

  /** Streams at once over datagrams; ms between their tokens. */
  async streams(host: string, count: number, tokens: number): Promise<number[]> {
    const client = new LatticeClient({ host, tenant: TENANT.granted, key: KEY })
    const gaps: number[] = []
    const one = async (): Promise<void> => {
      let before: number | undefined
      for await (const _ of client.generate({ prompt: 'Hi', maxTokens: tokens })) {
        const now = performance.now()
        if (before !== undefined) gaps.push(now - before)
        before = now
      }
    }
    await Promise.all(Array.from({ length: count }, one))
    return gaps
  },

  /** Requests one after the other for one token; ms until it came. */
  async firstTokens(kind: 'datagram' | 'http', host: string, bytes: number, count: number) {
    const prompt = 'a'.repeat(bytes)
    const client = new LatticeClient({ host, tenant: TENANT.granted, key: KEY })
    const agent = new Agent({ keepAlive: true })
    const times: number[] = []
    for (let i = 0; i < count; i++) {
      const from = performance.now()
      if (kind === 'datagram') {
        const answer = client.generate({ prompt, maxTokens: 1 })
        await answer.next()
        times.push(performance.now() - from)
        await answer.next()
      } else times.push(await overHttp(agent, host, prompt, from))
    }
    agent.destroy()
    return times
  },
}

/**
 * From now on kernel threads take an interface's frames from its driver; else whoever sends does.
 * Only while a program is attached.
 * @param before threads of that name which are others'
 */
function inThreads(name: string, cpu: number, before: readonly number[]): number[] {
  writeFileSync(`/sys/class/net/${name}/threaded`, '1')
  const threads = napiThreads(name).filter((id) => !before.includes(id))
  for (const id of threads) execFileSync('taskset', ['-pc', `${cpu}`, `${id}`])
  return threads
}

function serviceFor(answering: Engine, tokenizer: Tokenizer, modelPath?: string): NetService {
  const limits = { keys, tokensPerSecond: 1e9, burstTokens: 1e9, maxRunning: 1 << 20 }
  const poor = { ...limits, tokensPerSecond: 10, burstTokens: 1000 }
  return new NetService({
    engine: answering,
    tokenizer,
    modelPath,
    template: undefined,
    publishes: false,
    maxRunning: 1 << 20,
    warn: (line) => process.stderr.write(`${line}\n`),
    tenants: [
      { index: TENANT.granted, name: 'granted', ...limits },
      { index: TENANT.refused, name: 'refused', ...poor },
    ],
  })
}

async function attach(name: string, busyPollBudget = 0, ring?: NetRing): Promise<void> {
  const how = { name, queue: undefined, force: false, mode: 'native', port: PROTOCOL_PORT } as const
  await service?.attach({ ...how, allowGeneric: false, busyPollBudget, ring })
}

async function overHttp(agent: Agent, host: string, prompt: string, from: number): Promise<number> {
  const { promise, resolve } = Promise.withResolvers<number>()
  const request = httpRequest({
    agent,
    host,
    port: HTTP_PORT,
    path: '/v1/completions',
    method: 'POST',
    headers: { 'content-type': 'application/json' },
  })
  request.once('response', async (response) => {
    let first: number | undefined
    response.once('data', () => (first = performance.now() - from))
    await text(response)
    resolve(first ?? 0)
  })
  request.end(JSON.stringify({ model: 'bench', prompt, max_tokens: 1, stream: true }))
  return promise
}

if (import.meta.main) answerCalls(COMMANDS)
