// Owns the measurement of beam search in the core against the same search above the engine: a
// client that at every step sends each beam as a request of one token and ranks what comes back.
//
//   node bench/beams.ts [--model NAME] [--width 4] [--prompt 512] [--tokens 128] [--rounds 1]
//
// Both search for as many tokens, without an end token. The client has the prefix cache too.

import { parseArgs } from 'node:util'
import type { Engine, EngineSnapshot, SequenceRequest, SequenceSink } from '../src/engine/api.ts'
import { GREEDY } from '../src/engine/api.ts'
import { BeamSearch } from '../src/engine/beams.ts'
import { startEngine } from '../src/engine/start.ts'
import { pagesFor } from '../src/kv/layout.ts'
import { hostKvLayout } from '../src/backends/cpu/kv-memory.ts'
import { openModel } from '../src/model/load.ts'
import { resolveModel } from '../src/model/registry.ts'

const { values } = parseArgs({
  options: {
    model: { type: 'string' },
    width: { type: 'string', default: '4' },
    prompt: { type: 'string', default: '512' },
    tokens: { type: 'string', default: '128' },
    rounds: { type: 'string', default: '1' },
    /** Tokens of the client's searches: it takes long, and as long for each. */
    'client-tokens': { type: 'string', default: '16' },
  },
})
const width = Number(values.width)
const tokens = Number(values.tokens)
const clientTokens = Number(values['client-tokens'])
const prompt = Int32Array.from(
  { length: Number(values.prompt) },
  (_, i) => 300 + ((i * 7919) % 29e3),
)
const beams = { width, lengthPenalty: 1, earlyStopping: false } as const

const { id, path } = await resolveModel(values.model)
const { config } = openModel(path)

function requestOf(change: Partial<SequenceRequest>): SequenceRequest {
  const from = { requestId: 'bench', tenant: 'bench', prompt, sampling: GREEDY }
  return { ...from, maxTokens: tokens, stopTokens: [], topLogprobs: undefined, ...change }
}

interface Told {
  tokens: number[]
  top: readonly { token: number; logprob: number }[]
  score: number | undefined
}

function submit(engine: Engine, request: SequenceRequest): Promise<Told> {
  return new Promise((resolve, reject) => {
    const told: Told = { tokens: [], top: [], score: undefined }
    const sink: SequenceSink = {
      onToken: (token, logprobs) => {
        told.tokens.push(token)
        told.top = logprobs?.top ?? []
      },
      onFinish: (_reason, _count, error, score) =>
        error ? reject(error) : resolve({ ...told, score }),
    }
    engine.submitChoices(request, [{ sampling: GREEDY, sink }])
  })
}

/** The search above the engine. Returns the best hypothesis. */
async function searchAbove(engine: Engine, length: number): Promise<number[]> {
  const search = new BeamSearch(beams, length, [])
  let running: number[][] = [[]]
  for (;;) {
    const asked = running.map((output) => {
      const whole = Int32Array.from([...prompt, ...output])
      const topLogprobs = search.candidates
      return submit(engine, requestOf({ prompt: whole, maxTokens: 1, topLogprobs }))
    })
    for (const [beam, { top }] of (await Promise.all(asked)).entries()) search.offer(beam, top)
    const next = search.advance()
    if (next.length === 0) return search.hypotheses()[0]!.tokens
    running = next.map(({ parent, token }) => [...running[parent]!, token])
  }
}

/** Most pages in use while `act` runs, seen every few steps. */
async function peakPages(engine: Engine, act: () => Promise<unknown>): Promise<number> {
  let peak = 0
  const see = ({ kv }: EngineSnapshot): void => void (peak = Math.max(peak, kv.usedPages))
  const timer = setInterval(() => void engine.snapshot().then(see, () => {}), 20)
  await act()
  clearInterval(timer)
  return peak
}

/** @param prefixCacheBytes for the client's requests; the core's search computes its prompt */
function open(prefixCacheBytes: number): Promise<Engine> {
  const contextLength = prompt.length + tokens + 1
  const options = { modelId: id, device: 'cpu', maxSequences: 2 * width, contextLength } as const
  return startEngine(path, { ...options, prefixCacheBytes }).then(({ engine }) => engine)
}

const layout = hostKvLayout(config, prompt.length + tokens + 1)
const unshared = width * pagesFor(layout, prompt.length + tokens)

async function timed<T>(count: number, act: () => Promise<T>): Promise<[perS: number, T]> {
  const start = performance.now()
  const result = await act()
  return [(1000 * count) / (performance.now() - start), result]
}

async function measureCore() {
  const engine = await open(0)
  await submit(engine, requestOf({ maxTokens: 2 }))
  let score: number | undefined
  const before = await engine.snapshot()
  const [perS, peak] = await timed(tokens, () =>
    peakPages(engine, async () => void ({ score } = await submit(engine, requestOf({ beams })))),
  )
  const after = await engine.snapshot()
  const computeMs = after.computeMs - before.computeMs
  const overheadMs = after.stepMs - before.stepMs - computeMs
  const short = await submit(engine, requestOf({ beams, maxTokens: clientTokens }))
  const [greedyPerS] = await timed(tokens, () => submit(engine, requestOf({})))
  const { beamCopies } = await engine.snapshot()
  await engine.close()
  const overhead = (100 * overheadMs) / (overheadMs + computeMs)
  return { perS, peak, overhead, score, short, greedyPerS, beamCopies }
}

async function measureClient() {
  const engine = await open(256 << 20)
  await submit(engine, requestOf({ maxTokens: 2 }))
  const [perS, found] = await timed(clientTokens, () => searchAbove(engine, clientTokens))
  await engine.close()
  return { perS, found }
}

const rounds = []
for (let round = 0; round < Number(values.rounds); round++) {
  const core = await measureCore()
  const client = await measureClient()
  rounds.push({
    core_tokens_per_s: core.perS,
    client_tokens_per_s: client.perS,
    ratio: core.perS / client.perS,
    overhead_percent: core.overhead,
    overhead_ms_per_token: (core.overhead * 10) / core.perS,
    greedy_tokens_per_s: core.greedyPerS,
    kv_peak_pages: core.peak,
    kv_unshared_pages: unshared,
    kv_percent: (100 * core.peak) / unshared,
    copies: core.beamCopies,
    score: core.score,
    same_hypothesis: core.short.tokens.join() === client.found.join(),
  })
}
const sizes = { width, prompt_tokens: prompt.length, output_tokens: tokens }
console.log(JSON.stringify({ model: id, ...sizes, rounds }, undefined, 2))
