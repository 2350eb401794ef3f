// Owns the question how well four hashes of a prompt's beginning steer it: a trace of chats over
// four replicas, each with a model of a prefix cache, chosen by the real program (a HELLO in, a
// GRANT out, by BPF_PROG_TEST_RUN), by an oracle that sees all caches, and in turn.
//
//   node bench/steering.ts [--processes N] [CHATS] [SEED…]
//
// With --processes the same trace goes to real engine processes: bench/steering-processes.ts.

import { parseArgs } from 'node:util'
import { frame, udpOffset } from '../test/support/packets.ts'
import { Random } from '../test/support/random.ts'
import { Ingress } from '../src/net/ingress.ts'
import {
  fragmentsOf,
  HEADER_BYTES,
  type Header,
  hashOf,
  MESSAGE_TYPES,
  PREFIX_LADDER,
  readHeader,
  writeHeader,
} from '../src/net/protocol.ts'
import { sipKey } from '../src/net/siphash.ts'
import { measureProcesses } from './steering-processes.ts'
import { cacheBytes, makeTrace, type Turn } from './steering-trace.ts'

const REPLICAS = 4
const TENANT = 1
/** As much as 16 tokens: what a cache shares at least. */
const BLOCK = 64
/** Requests that run at once, over all replicas. */
const RUNNING = 16
const KEY_BYTES = new Uint8Array(16).fill(3)
const KEY = sipKey(KEY_BYTES)
const keysOf = new Map<Uint8Array, string[]>()

/** Blocks by the hash of all bytes up to their end; the longest unused go, deepest first. */
class Cache {
  readonly blocks = new Map<string, number>()
  private readonly capacity: number
  private tick = 0

  /** @param capacity in blocks */
  constructor(capacity: number) {
    this.capacity = capacity
  }

  /** Bytes of a prompt that are there. */
  find(keys: readonly string[]): number {
    const missing = keys.findIndex((key) => !this.blocks.has(key))
    return (missing < 0 ? keys.length : missing) * BLOCK
  }

  /** Keeps a prompt; returns what had to go. */
  keep(keys: readonly string[]): string[] {
    this.tick++
    // In insertion order the first are the oldest; of one prompt its end before its beginning.
    for (const key of keys.toReversed()) {
      this.blocks.delete(key)
      this.blocks.set(key, this.tick)
    }
    const gone: string[] = []
    for (const key of this.blocks.keys()) {
      if (this.blocks.size <= this.capacity) break
      this.blocks.delete(key)
      gone.push(key)
    }
    return gone
  }
}

interface Chooser {
  choose(prompt: Uint8Array, keys: readonly string[], caches: readonly Cache[]): number
  kept?(replica: number, prompt: Uint8Array, keys: readonly string[], gone: readonly string[]): void
  /** The oldest running request has ended. */
  ended?(): void
}

function replay(
  trace: readonly Turn[],
  capacity: number,
  chooser: Chooser,
): { hits: number; spread: number } {
  const caches = Array.from({ length: REPLICAS }, () => new Cache(capacity))
  const given = Array.from({ length: REPLICAS }, () => 0)
  let found = 0
  trace.forEach(({ prompt }, i) => {
    const keys = blockKeys(prompt)
    if (i >= RUNNING) chooser.ended?.()
    const replica = chooser.choose(prompt, keys, caches)
    given[replica]!++
    const cache = caches[replica]!
    found += cache.find(keys)
    const gone = cache.keep(keys)
    chooser.kept?.(replica, prompt, keys, gone)
  })
  return { hits: found, spread: (Math.max(...given) * REPLICAS) / trace.length }
}

function blockKeys(prompt: Uint8Array): string[] {
  let keys = keysOf.get(prompt)
  if (keys) return keys
  keys = []
  let before = 0n
  const block = new Uint8Array(BLOCK + 8)
  for (let at = 0; at + BLOCK <= prompt.length; at += BLOCK) {
    block.set(prompt.subarray(at, at + BLOCK))
    new DataView(block.buffer).setBigUint64(BLOCK, before)
    before = hashOf(KEY, block)
    keys.push(before.toString(36))
  }
  keysOf.set(prompt, keys)
  return keys
}

/** Hashes of the prefixes that a prompt has, and as many zeros that there are four. */
function rungsOf(prompt: Uint8Array, ladder: readonly number[]): bigint[] {
  const fitting = ladder.filter((length) => length <= prompt.length)
  const hashes = fitting.map((length) => hashOf(KEY, prompt.subarray(0, length)))
  return [...hashes, 0n, 0n, 0n, 0n].slice(0, Math.max(4, hashes.length))
}

function byTurn(): Chooser {
  let next = 0
  return { choose: () => next++ % REPLICAS }
}

/**
 * The longest prefix; of equals the least loaded.
 * @param limited passes over replicas that have too much to do, by the program's own rule
 */
function byOracle(limited: boolean): Chooser {
  const load = Array.from({ length: REPLICAS }, () => 0)
  const running: number[] = []
  return {
    choose(_prompt, keys, caches) {
      const least = Math.min(...load)
      const most = limited ? 1.5 * least + 4 : Infinity
      const found = caches.map((cache, i) => (load[i]! <= most ? cache.find(keys) : -1))
      const longest = Math.max(...found)
      const holders = found.flatMap((length, i) => (length === longest ? [i] : []))
      const best = holders.reduce((a, b) => (load[b]! < load[a]! ? b : a))
      load[best]!++
      running.push(best)
      return best
    },
    ended: () => void load[running.shift()!]!--,
  }
}

/** @param ladder lengths of prefixes; a HELLO has the hashes of the four longest that it has */
function byProgram(ladder: readonly number[]): Chooser {
  const ingress = Ingress.load()
  ingress.setMaxRunning(1 << 20)
  for (let i = 0; i < REPLICAS; i++) ingress.setReplica(i, 'model')
  const keys = [KEY_BYTES, KEY_BYTES] as const
  const limits = { tokensPerSecond: 1e9, burstTokens: 1e9, maxRunning: 1 << 20 }
  ingress.setTenant(TENANT, { keys, ...limits })
  /** By published hash: a bit a replica, and by block which hashes end with it. */
  const holders = new Map<bigint, bigint>()
  const rungs = new Map<string, Set<bigint>>()
  const running: bigint[] = []
  let request = 1n
  const publish = (hash: bigint, replica: number, held: boolean): void => {
    const bit = 1n << BigInt(replica)
    const now = held ? (holders.get(hash) ?? 0n) | bit : (holders.get(hash) ?? 0n) & ~bit
    holders.set(hash, now)
    ingress.publish(hash, now)
  }
  return {
    choose(prompt) {
      const view = new DataView(new ArrayBuffer(HEADER_BYTES))
      const header = {
        type: MESSAGE_TYPES.hello,
        tenant: TENANT,
        request: request++,
        timeUs: BigInt(Date.now()) * 1000n,
        promptBytes: prompt.length,
        maxTokens: 100,
        fragments: fragmentsOf(prompt.length),
        words: rungsOf(prompt, ladder).slice(-4) as Header['words'],
      }
      writeHeader(view, header, KEY)
      const { packet } = ingress.program.testRun(frame(new Uint8Array(view.buffer)))
      const answer = new DataView(
        packet.buffer,
        packet.byteOffset + udpOffset({}) + 8,
        HEADER_BYTES,
      )
      const granted = readHeader(answer, KEY)
      if (granted?.type !== MESSAGE_TYPES.grant) throw new Error(`refused: ${granted?.code}`)
      running.push(header.request)
      return granted.route - 1
    },
    kept(replica, prompt, blocks, gone) {
      rungsOf(prompt, ladder).forEach((hash, i) => {
        const last = blocks[ladder[i]! / BLOCK - 1]
        if (last === undefined) return
        const known = rungs.get(last) ?? new Set()
        rungs.set(last, known.add(hash))
        publish(hash, replica, true)
      })
      for (const block of gone) {
        for (const hash of rungs.get(block) ?? []) publish(hash, replica, false)
      }
    },
    ended: () => void ingress.finish(TENANT, running.shift()!, 0),
  }
}

function measureModel(count: number, seed: number): void {
  const trace = makeTrace(count, new Random(seed))
  const bytes = trace.reduce((sum, { prompt }) => sum + prompt.length, 0)
  const capacity = Math.floor(cacheBytes(count) / BLOCK)
  console.log(
    `${trace.length} prompts of ${count} chats, ${(bytes / trace.length / 1024).toFixed(1)} KiB ` +
      `on average, ${REPLICAS} caches of ${((capacity * BLOCK) / 1024).toFixed(0)} KiB, ` +
      `seed ${seed}`,
  )
  for (const [name, chooser] of [
    ['program', () => byProgram(PREFIX_LADDER)],
    ['  4 lengths', () => byProgram([1024, 4096, 16_384, 65_536])],
    ['oracle', () => byOracle(true)],
    ['  unlimited', () => byOracle(false)],
    ['round robin', byTurn],
  ] as const) {
    const { hits, spread } = replay(trace, capacity, chooser())
    console.log(
      `${name.padEnd(12)} hit rate ${((100 * hits) / bytes).toFixed(2)} %, busiest replica ` +
        `${spread.toFixed(2)} times the mean`,
    )
  }
}

const { values, positionals } = parseArgs({
  options: { processes: { type: 'string' } },
  allowPositionals: true,
})
const [chats = 200, ...seeds] = positionals.map(Number)
for (const seed of seeds.length > 0 ? seeds : [1]) {
  if (values.processes === undefined) measureModel(chats, seed)
  else await measureProcesses(Number(values.processes), chats, seed)
}
