// Owns the measurement of what waiting for a whole load costs: a conversation comes back from disk
// and goes on when all of it is there, or at once, touching pages that are still on their way;
// alone, and beside a stream that would stand still meanwhile.
//
//   node bench/kv-resume.ts [--model NAME] [--tokens 2000] [--rounds 7] [--threads 2]

import { parseArgs } from 'node:util'
import { CHUNK_TOKENS_MIN, CpuBackend } from '../src/backends/cpu/backend.ts'
import { GREEDY, type SequenceRequest } from '../src/engine/api.ts'
import { EngineCore } from '../src/engine/core.ts'
import { allowedCpus } from '../src/ffi/libc.ts'
import type { KvTier } from '../src/kv/tier.ts'
import { openModel } from '../src/model/load.ts'
import { resolveModel } from '../src/model/registry.ts'
import { stepTokensNeeded } from '../src/scheduler/scheduler.ts'
import { PagerHost } from '../src/tier/pager-host.ts'

const { values } = parseArgs({
  options: {
    model: { type: 'string' },
    tokens: { type: 'string', default: '2000' },
    rounds: { type: 'string', default: '7' },
    threads: { type: 'string', default: '2' },
  },
})
const tokens = Number(values.tokens)
const rounds = Number(values.rounds)
const MAX_SEQUENCES = 4
const MEMORY_PAGES = 1 << 18
const STREAM_TOKENS = 200

/** Lets a tier say that loads have ended as soon as they have begun, while `hasty.on`. */
function hurry(tier: KvTier, hasty: { on: boolean }): void {
  const { load, poll } = tier
  const early: number[] = []
  const told = new Set<number>()
  tier.load = (...transfer) => {
    const ticket = load.apply(tier, transfer)
    if (hasty.on) early.push(ticket)
    return ticket
  }
  tier.poll = () => {
    const begun = early.splice(0).map((ticket) => ({ ticket, error: undefined }))
    for (const { ticket } of begun) told.add(ticket)
    return [...begun, ...poll.apply(tier).filter(({ ticket }) => !told.delete(ticket))]
  }
}

const { path } = await resolveModel(values.model)
const signal = new SharedArrayBuffer(4)
let pager: PagerHost | undefined
const backend = new CpuBackend(openModel(path), {
  contextLength: tokens + STREAM_TOKENS,
  maxSequences: MAX_SEQUENCES,
  stepTokens: stepTokensNeeded(MAX_SEQUENCES, CHUNK_TOKENS_MIN) + 512,
  cpus: allowedCpus().slice(0, Number(values.threads)),
  pin: false,
  offload: {
    bytes: 1 << 30,
    signal,
    startPager: (start) => {
      pager = new PagerHost(start)
    },
  },
})
const { kv } = backend
const tier = kv.tier!
const hasty = { on: false }
hurry(tier, hasty)
/** By id: when each token came. */
const times = new Map<number, number[]>()
const ended = new Set<number>()
const core = new EngineCore(
  backend,
  { maxSequences: MAX_SEQUENCES, kvPages: MEMORY_PAGES, prefixPages: MEMORY_PAGES / 2 },
  {
    onStart() {},
    onToken: (id) => void times.get(id)?.push(performance.now()),
    onFinish: (id, _reason, _count, error) => {
      if (error) throw error
      ended.add(id)
    },
  },
  () => performance.now(),
)

let ids = 0

function submit(tenant: string, prompt: Int32Array, maxTokens: number): number {
  const id = ids++
  times.set(id, [])
  const rest = { sampling: GREEDY, stopTokens: [], topLogprobs: undefined }
  const request: SequenceRequest = { requestId: 'bench', tenant, prompt, maxTokens, ...rest }
  core.submit(id, request)
  return id
}

/** Steps as the engine's thread does, until something holds. */
function runUntil(done: () => boolean): void {
  while (!done()) {
    const seen = Atomics.load(new Int32Array(signal), 0)
    if (core.step()) continue
    Atomics.wait(new Int32Array(signal), 0, seen, core.settle() ?? 1)
  }
}

function prompt(length: number, stream: number): Int32Array {
  return Int32Array.from({ length }, (_, i) => 300 + ((i * 7919 + stream * 104_729) % 29_000))
}

/** Milliseconds to the first token of what comes back, and the longest gap of a stream beside. */
function resume(round: number, runs: boolean, beside: boolean): { ttft: number; gap: number } {
  const tenant = `${round} ${runs} ${beside}`
  const text = prompt(tokens + CHUNK_TOKENS_MIN, round)
  const first = submit(tenant, text, 1)
  runUntil(() => ended.has(first))
  for (;;) {
    const [session] = core.answer({ kind: 'sessions', tenant })
    if (session?.where === 'disk') break
    if (session) core.answer({ kind: 'offload', tenant, id: session.id })
    core.settle()
    core.step()
  }
  const stream = beside ? submit('stream', prompt(64, 1e6), STREAM_TOKENS) : -1
  runUntil(() => !beside || (times.get(stream)?.length ?? 0) > 8)
  hasty.on = runs
  const start = performance.now()
  const again = submit(tenant, text, 1)
  runUntil(() => ended.has(again))
  const end = times.get(again)![0]!
  hasty.on = false
  const around = (times.get(stream) ?? []).filter((at) => at > start - 50 && at <= end)
  const gap = Math.max(0, ...around.map((at, i) => at - (around[i - 1] ?? at)))
  runUntil(() => core.idle)
  return { ttft: end - start, gap }
}

function median(numbers: readonly number[]): number {
  return numbers.toSorted((a, b) => a - b)[numbers.length >> 1] ?? NaN
}

try {
  resume(0, false, true)
  for (const beside of [false, true]) {
    const found = [false, true].map((runs) => ({
      runs,
      ttft: [] as number[],
      gap: [] as number[],
    }))
    const faultsBefore = tier.faults
    for (let round = 1; round <= rounds; round++) {
      for (const one of found) {
        const { ttft, gap } = resume(round, one.runs, beside)
        one.ttft.push(ttft)
        one.gap.push(gap)
      }
    }
    for (const { runs, ttft, gap } of found) {
      const way = runs ? 'runs while it comes' : 'waits for all of it'
      const stalled = beside ? `; the stream's longest gap ${median(gap).toFixed(1)} ms` : ''
      console.log(
        `${beside ? 'beside a stream' : 'alone'}, ${way}: ${tokens} tokens,` +
          ` first token after ${median(ttft).toFixed(1)} ms${stalled}`,
      )
    }
    console.log(`touches of pages that were not there: ${tier.faults - faultsBefore}`)
  }
} finally {
  backend.close()
  await pager?.terminate()
}
