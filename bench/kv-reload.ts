// Owns the measurement of what memory remembers: the first token of a second request that begins
// like a first one, resuming a conversation from disk against computing it again, and whether
// sequences that were on disk say what they would have said.
//
//   node bench/kv-reload.ts [--model NAME] [--threads N] [--rounds 5] [--sequences 100]

import { parseArgs } from 'node:util'
import type { SequenceRequest, SequenceSink, SessionSnapshot } from '../src/engine/api.ts'
import { GREEDY } from '../src/engine/api.ts'
import { startEngine } from '../src/engine/start.ts'
import { resolveModel } from '../src/model/registry.ts'

const { values } = parseArgs({
  options: {
    model: { type: 'string' },
    threads: { type: 'string' },
    rounds: { type: 'string', default: '5' },
    sequences: { type: 'string', default: '100' },
  },
})
const rounds = Number(values.rounds)
const { id, path } = await resolveModel(values.model)
const { engine, report } = await startEngine(path, {
  modelId: id,
  device: 'cpu',
  prefixCacheBytes: 1 << 30,
  kvOffload: { bytes: 2 * 2 ** 30 },
  ...(values.threads && { threads: Number(values.threads) }),
})
for (const line of report) console.log(line)

interface Answer {
  tokens: number[]
  cached: number
  ttftMs: number
}

/** Ordinary token ids that differ by stream. */
function prompt(length: number, stream: number): Int32Array {
  return Int32Array.from({ length }, (_, i) => 300 + ((i * 7919 + stream * 104_729) % 29_000))
}

let tenants = 0

function ask(tenant: string, ids: Int32Array, maxTokens: number): Promise<Answer> {
  return new Promise((resolve, reject) => {
    const answer: Answer = { tokens: [], cached: 0, ttftMs: 0 }
    const request: SequenceRequest = {
      requestId: 'bench',
      tenant,
      prompt: ids,
      sampling: GREEDY,
      maxTokens,
      stopTokens: [],
      topLogprobs: undefined,
    }
    const startMs = performance.now()
    const sink: SequenceSink = {
      onStart: (cached) => (answer.cached = cached),
      onToken: (token) => {
        if (answer.tokens.push(token) === 1) answer.ttftMs = performance.now() - startMs
      },
      onFinish: (_reason, _count, error) => (error ? reject(error) : resolve(answer)),
    }
    engine.submit(request, sink)
  })
}

/** Moves all that a tenant has cached to disk. */
async function offload(tenant: string): Promise<void> {
  const out = ({ where }: SessionSnapshot) => where === 'disk'
  for (;;) {
    const sessions = await engine.ask({ kind: 'sessions', tenant })
    if (sessions.length > 0 && sessions.every(out)) return
    for (const session of sessions) {
      if (!out(session)) await engine.ask({ kind: 'offload', tenant, id: session.id })
    }
    await new Promise((resolve) => setTimeout(resolve, 2))
  }
}

function median(numbers: readonly number[]): number {
  return numbers.toSorted((a, b) => a - b)[numbers.length >> 1] ?? NaN
}

function line(what: string, first: number[], second: number[]): void {
  const ratios = first.map((ms, i) => (second[i] ?? NaN) / ms)
  const figures = [median(first), median(second)].map((ms) => `${ms.toFixed(1)} ms`.padStart(11))
  console.log(`${what.padEnd(44)}${figures.join('')}   ${median(ratios).toFixed(3)} ×`)
}

await ask('warm-up', prompt(600, 1), 4)

const [first, second]: [number[], number[]] = [[], []]
for (let round = 0; round < rounds; round++) {
  const tenant = `tenant ${tenants++}`
  const one = prompt(1564, 10 + round)
  const other = one.slice()
  other.set(prompt(64, 1000 + round), 1500)
  first.push((await ask(tenant, one, 1)).ttftMs)
  const { ttftMs, cached } = await ask(tenant, other, 1)
  if (cached !== 1500) throw new Error(`${cached} of 1,500 shared tokens were found`)
  second.push(ttftMs)
}
console.log(`\n${''.padEnd(44)}      first     second`)
line('TTFT, 1,500 of 1,564 tokens shared', first, second)

for (const length of [1000, 2000]) {
  const [computed, resumed]: [number[], number[]] = [[], []]
  for (let round = 0; round < rounds; round++) {
    const tenant = `tenant ${tenants++}`
    // 64 tokens are computed in any case; the conversation behind them is what comes back.
    const ids = prompt(length + 64, 2000 + length + round)
    computed.push((await ask(tenant, ids, 1)).ttftMs)
    await offload(tenant)
    const { ttftMs, cached } = await ask(tenant, ids, 1)
    if (cached !== length) throw new Error(`${cached} of ${length} tokens came back`)
    resumed.push(ttftMs)
  }
  line(`TTFT, ${length} of ${length + 64} tokens from disk`, computed, resumed)
}

const count = Number(values.sequences)
let same = 0
for (let i = 0; i < count; i++) {
  const tenant = `tenant ${tenants++}`
  const ids = prompt(100 + ((i * 37) % 400), 5000 + i)
  const before = await ask(tenant, ids, 24)
  await offload(tenant)
  const after = await ask(tenant, ids, 24)
  if (after.cached > 0 && `${after.tokens}` === `${before.tokens}`) same++
}
console.log(`same 24 greedy tokens after a time on disk: ${same} of ${count} sequences`)
await engine.close()
