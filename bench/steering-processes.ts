// Owns steering measured with real processes: engines with real prefix caches, one of which owns a
// veth and its XDP program, the others joined to it; a client in another namespace replays chats by
// the datagram protocol. What is a hit the engines' own counters say.

import { join } from 'node:path'
import { Host, type TwoHosts, twoHosts } from '../test/net/namespaces.ts'
import { Random } from '../test/support/random.ts'
import { temporaryDirectory } from '../test/support/temporary.ts'
import { cacheBytes, makeTrace, type Turn } from './steering-trace.ts'

/** Requests that run at once when it is measured. */
const RUNNING = 16
/** The longest prompt, and an answer. */
const CONTEXT = 49_152
/** Bytes of memory that a token takes in the engine that computes nothing. */
const TOKEN_BYTES = 64
/** What the oracle knows of a cache, to so many tokens. */
const GRAIN = 128
const ANSWER_TOKENS = 2

const KEY = new Uint8Array(16).fill(3)
const TENANT = {
  ...{ index: 1, name: 'one', keys: [KEY, KEY] as const },
  ...{ tokensPerSecond: 1e9, burstTokens: 1e9, maxRunning: 1000 },
}
const CLIENT = { host: '10.99.0.2', tenant: TENANT.index, key: KEY }

interface Stage {
  two: TwoHosts
  engines: Host[]
}

/** Says where a prompt has to go; undefined leaves it to the program. */
type Chooser = (
  stage: Stage,
  prompt: string,
  load: readonly number[],
) => Promise<number | undefined>

export interface Row {
  hits: number
  queries: number
  /** The busiest replica's requests, against the mean. */
  spread: number
  /** Prompt tokens that the clients were told were cached. */
  told: number
  requests: number
}

export const CHOOSERS = {
  program: (): Chooser => async () => undefined,
  oracle: () => byOracle(true),
  '  unlimited': () => byOracle(false),
  'round robin': byTurn,
}

function byTurn(): Chooser {
  let next = 0
  return async ({ engines }) => next++ % engines.length
}

/**
 * The replica that has the most of the prompt in memory now, as its engine says; of equals the
 * least loaded.
 * @param limited passes over replicas that have too much to do, by the program's own rule
 */
function byOracle(limited: boolean): Chooser {
  return async ({ engines }, prompt, load) => {
    const cached = await Promise.all(
      engines.map((engine) => engine.call('cachedTokens', TENANT.name, prompt, GRAIN)),
    )
    const most = limited ? 1.5 * Math.min(...load) + 4 : Infinity
    const found = cached.map((tokens, i) => (load[i]! <= most ? tokens : -1))
    const longest = Math.max(...found)
    const holders = found.flatMap((tokens, i) => (tokens === longest ? [i] : []))
    return holders.reduce((a, b) => (load[b]! < load[a]! ? b : a))
  }
}

export async function measureProcesses(
  processes: number,
  chats: number,
  seed: number,
): Promise<void> {
  const trace = makeTrace(chats, new Random(seed))
  const bytes = trace.reduce((sum, { prompt }) => sum + prompt.length, 0)
  console.log(
    `${trace.length} prompts of ${chats} chats, ${(bytes / trace.length / 1024).toFixed(1)} KiB ` +
      `on average, ${processes} engine processes with caches of ` +
      `${(cacheBytes(chats) / 1024).toFixed(0)} KiB of text, ${RUNNING} at once, seed ${seed}`,
  )
  for (const name of ['program', 'oracle', '  unlimited', 'round robin'] as const) {
    const row = await replay(processes, cacheBytes(chats), trace, name)
    const { hits, queries, spread, told, requests } = row
    const agree = told === hits ? '' : ` (clients were told of ${told})`
    console.log(
      `${name.padEnd(12)} hit rate ${((100 * hits) / queries).toFixed(2)} %: ${hits} of ` +
        `${queries} tokens${agree}, ${requests} requests, busiest engine ` +
        `${spread.toFixed(2)} times the mean`,
    )
  }
}

/**
 * @param cache bytes of text that each engine's cache holds
 * @param atOnce requests that run at once, over all replicas; with one, every run of a trace is the
 *   same
 */
export async function replay(
  processes: number,
  cache: number,
  trace: readonly Turn[],
  chooser: keyof typeof CHOOSERS,
  atOnce = RUNNING,
): Promise<Row> {
  const two = await twoHosts()
  const stage: Stage = { two, engines: [two.server] }
  try {
    await open(stage, processes, cache * TOKEN_BYTES)
    const { told, given } = await drive(stage, trace, CHOOSERS[chooser](), atOnce)
    const counts = await Promise.all(stage.engines.map((engine) => engine.call('engine')))
    const hits = counts.reduce((sum, { prefixHits = 0 }) => sum + prefixHits, 0)
    const queries = counts.reduce((sum, { prefixQueries = 0 }) => sum + prefixQueries, 0)
    const spread = (Math.max(...given) * processes) / trace.length
    return { hits, queries, spread, told, requests: given.reduce((a, b) => a + b, 0) }
  } finally {
    await Promise.all(stage.engines.map((engine) => engine.end()))
    await stage.two.remove()
  }
}

/** The first engine owns the interface. */
async function open(stage: Stage, processes: number, prefixCacheBytes: number): Promise<void> {
  const { two, engines } = stage
  const path = join(temporaryDirectory('steering'), 'socket')
  const engine = { prefixCacheBytes, contextLength: CONTEXT, reply: { text: '', times: 0 } }
  const serve = { interface: 'veth-s', tenants: [TENANT], share: path }
  await two.server.call('serve', { ...serve, ...engine })
  while (engines.length < processes) {
    const host = new Host(two.server.namespace, 'veth-s', two.server.address)
    engines.push(host)
    await host.call('join', path, engine)
  }
}

/** As many as may run at once, in the trace's order; a chat's next turn waits for its answer. */
async function drive(
  stage: Stage,
  trace: readonly Turn[],
  choose: Chooser,
  atOnce: number,
): Promise<{ told: number; given: number[] }> {
  const { two, engines } = stage
  const { client, server } = two
  const load = engines.map(() => 0)
  const given = engines.map(() => 0)
  const rest = [...trace]
  const busy = new Set<number>()
  const running = new Set<Promise<void>>()
  let told = 0
  const finish = async (id: number, chat: number, replica: number): Promise<void> => {
    const { cachedTokens } = await client.call('finish', id)
    told += cachedTokens
    load[replica]!--
    busy.delete(chat)
  }
  while (rest.length > 0) {
    const next = rest.findIndex(({ chat }) => !busy.has(chat))
    if (running.size >= atOnce || next < 0) {
      await Promise.race(running)
      continue
    }
    const [{ chat, prompt }] = rest.splice(next, 1) as [Turn]
    const text = Buffer.from(prompt).toString('latin1')
    const wanted = await choose(stage, text, load)
    if (wanted !== undefined) await server.call('only', engines.length, wanted)
    const { id, route } = await client.call('reserve', CLIENT, text, ANSWER_TOKENS)
    const replica = route - 1
    if (wanted !== undefined && wanted !== replica) throw new Error(`${replica}, not ${wanted}`)
    given[replica]!++
    load[replica]!++
    busy.add(chat)
    const run = finish(id, chat, replica).finally(() => running.delete(run))
    running.add(run)
  }
  await Promise.all(running)
  return { told, given }
}
