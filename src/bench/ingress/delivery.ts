// Owns the measurement of delivery: the CPU time that a server spends from a prompt of 4 KiB on the
// wire until its tokens lie in the scheduler's queue, over datagrams and over HTTP, in turns.

import { globSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { PROTOCOL_PORT } from '../../net/protocol.ts'
import { NET_RINGS, type NetRing } from '../../net/ring-choice.ts'
import { KEY, QUEUE_PORT, TENANT } from './host.ts'
import type { World } from './world.ts'

export interface DeliveryOptions {
  /** A model's file, for its tokenizer; without one a byte is a token. */
  model: string | undefined
  /** Prompts of a round. */
  prompts: number
  rounds: number
  /** Requests a second of the steady load; beside it, as fast as they go. */
  rate: number
  /** Both unless told. */
  rings?: readonly NetRing[]
  onProgress: (line: string) => void
}

export interface Delivery {
  /** Datagrams by what puts prompts together. */
  kind: NetRing | 'http'
  /** Requests a second; 0 is as fast as they go. */
  rate: number
  /** A prompt, all threads and the kernel's of the interface; the median over rounds. */
  cpu_us: number
  /** The least of a round, which is what others on the machine disturbed the least. */
  cpu_us_min: number
  /** The same by thread. */
  threads_us: Record<string, number>
}

const PROMPT_BYTES = 4096
const PROMPTS = 256
/** Compilers of the runtime are through with a server that has run for some seconds. */
const WARM_ROUNDS = 30
/** Datagrams: prompts on their way at once. Over HTTP each has a connection of its own. */
const WINDOW = 32

interface Load extends Pick<Delivery, 'kind' | 'rate'> {
  /** µs a prompt, by thread. */
  rounds: Record<string, number>[]
}

/**
 * Needs the server's host to itself: what it served before is detached. An interface has one ring
 * at a time, so HTTP takes turns with each of them in half of the rounds.
 */
export async function runDelivery(world: World, options: DeliveryOptions): Promise<Delivery[]> {
  const { server, client } = world
  const { rounds, rate, rings = NET_RINGS, onProgress } = options
  const file = join(world.folder, 'prompts')
  writeFileSync(file, prompts())
  const loads: Load[] = [rate, 0].flatMap((at) =>
    [...rings, 'http' as const].map((kind) => ({ kind, rate: at, rounds: [] })),
  )
  for (const ring of rings) {
    await client.call('detach')
    await server.call('queue', server.link, server.cpu, options.model ?? '', ring)
    await client.call('pass', client.link, client.cpu)
    const turns = loads.filter(({ kind }) => kind === ring || kind === 'http')
    for (let round = -WARM_ROUNDS; round < rounds; round++) {
      for (const load of turns) {
        if (load.kind === 'http' && round >= rounds / rings.length) continue
        const times = await deliver(world, file, load, options.prompts)
        if (round >= 0) load.rounds.push(times)
      }
    }
  }
  return loads.map(({ kind, rate: at, rounds: all }) => {
    const names = [...new Set(all.flatMap((times) => Object.keys(times)))]
    const threads = names.map((name) => [name, median(all.map((times) => times[name] ?? 0))])
    const sums = all.map((times) => Object.values(times).reduce((a, b) => a + b, 0))
    const cpu = median(sums)
    onProgress(`delivery by ${kind}, ${at}/s: ${cpu.toFixed(1)} µs of CPU a prompt`)
    return {
      kind,
      rate: at,
      cpu_us: cpu,
      cpu_us_min: Math.min(...sums),
      threads_us: Object.fromEntries(threads),
    }
  })
}

/** µs a prompt, by thread. */
async function deliver(
  world: World,
  file: string,
  { kind, rate }: Load,
  count: number,
): Promise<Record<string, number>> {
  const { server } = world
  const isHttp = kind === 'http'
  const key = Buffer.from(KEY).toString('hex')
  const delivering = await world.deliver(
    ...[
      isHttp ? kind : 'datagram',
      server.address,
      isHttp ? QUEUE_PORT : PROTOCOL_PORT,
      count,
      rate,
    ],
    ...[isHttp ? count : WINDOW, file, TENANT.granted, key],
  )
  const before = await server.call('times')
  delivering.begin()
  const after = await server.call('queued', count)
  await server.call('release')
  await delivering.done
  const names = Object.keys(after).filter((name) => (after[name] ?? 0) > (before[name] ?? 0))
  return Object.fromEntries(
    names.map((name) => [name, ((after[name] ?? 0) - (before[name] ?? 0)) / count / 1000]),
  )
}

/** The project's own prose and code, from as many places as there are prompts. */
function prompts(): Buffer {
  const root = join(import.meta.dirname, '..', '..', '..')
  const files = globSync(['README.md', 'ARCHITECTURE.md', 'docs/*.md', 'src/engine/*.ts'], {
    cwd: root,
  })
  const text = files
    .toSorted()
    .map((name) => readFileSync(join(root, name), 'latin1'))
    .join('\n')
  // Visible ASCII, so that a prompt has as many bytes whoever writes it down.
  const plain = text.replaceAll(/[^\n -~]+/g, '-')
  const step = Math.floor((plain.length - PROMPT_BYTES) / PROMPTS)
  const all = Array.from({ length: PROMPTS }, (_, i) =>
    plain.slice(i * step, i * step + PROMPT_BYTES),
  )
  return Buffer.from(all.join(''), 'latin1')
}

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b)
  return sorted[sorted.length >> 1] ?? NaN
}
