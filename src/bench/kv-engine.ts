// Owns the small trace that runs on the real engine: the same kinds of work, as requests, with and
// without what they share, timed.

import { type Engine, type EngineAnswers, GREEDY } from '../engine/api.ts'
import { RandomStream } from '../engine/sampler-random.ts'
import { startEngine } from '../engine/start.ts'

export interface KvEngineResult {
  work: string
  sharing: 'off' | 'on'
  seconds: number
  /** Most bytes of KV that running sequences held, as often as was looked between two steps. */
  peakBytes: number
  promptTokens: number
  foundTokens: number
  /** Really computed: neither found nor shared between choices. */
  computedTokens: number
  outputTokens: number
}

interface Ask {
  prompt: Int32Array
  output: number
  /** Choices that share the prompt. */
  choices: number
}

/** Requests of a round run together; a round begins when the one before has ended. */
interface Work {
  name: string
  rounds: Ask[][]
}

const LOOK_MS = 20
const CONTEXT = 1536

/** @throws LatticeError as `startEngine` does */
export async function runKvEngine(
  modelPath: string,
  seed: number,
  threads: number | undefined,
): Promise<KvEngineResult[]> {
  const results: KvEngineResult[] = []
  for (const sharing of ['off', 'on'] as const) {
    const { engine } = await startEngine(modelPath, {
      modelId: 'bench',
      device: 'cpu',
      contextLength: CONTEXT,
      maxSequences: 16,
      kvMemoryBytes: 1 << 30,
      prefixCacheBytes: sharing === 'on' ? 1 << 29 : 0,
      ...(threads === undefined ? {} : { threads }),
    })
    try {
      for (const work of works(seed, engine.model.vocabSize)) {
        results.push({ work: work.name, sharing, ...(await measure(engine, work, sharing)) })
      }
    } finally {
      await engine.close()
    }
  }
  return results.toSorted((a, b) => order(a) - order(b))
}

const NAMES = [
  'short chats',
  'long documents',
  'shared system prompt',
  'four choices',
  'agent tree',
]

function order({ work }: KvEngineResult): number {
  return NAMES.indexOf(work)
}

function works(seed: number, vocab: number): Work[] {
  const random = new RandomStream(seed)
  const between = (low: number, high: number): number =>
    low + Math.floor(random.uniform() * (high - low))
  const text = (length: number): Int32Array =>
    Int32Array.from({ length }, () => between(Math.min(300, vocab >> 1), vocab))
  const join = (...parts: Int32Array[]): Int32Array =>
    Int32Array.from(parts.flatMap((part) => [...part]))
  const ask = (prompt: Int32Array, output: number, choices = 1): Ask => ({
    prompt,
    output,
    choices,
  })

  const first = Array.from({ length: 6 }, () => ask(text(between(80, 200)), 24))
  // A stand-in for the answer: the next turn's prompt must be the same with and without sharing.
  const second = first.map(({ prompt }) => ask(join(prompt, text(24), text(between(20, 60))), 24))
  const documents = [text(1000), text(1200)]
  const questions = [0, 1].map(() => documents.map((document) => ask(join(document, text(80)), 16)))
  const system = text(600)
  const assistants = Array.from({ length: 4 }, () =>
    Array.from({ length: 4 }, () => ask(join(system, text(between(70, 120))), 16)),
  )
  let branches = [text(500)]
  const tree: Ask[][] = [branches.map((prompt) => ask(prompt, 8))]
  for (let level = 0; level < 2; level++) {
    branches = branches.flatMap((prompt) => [0, 1, 2, 3].map(() => join(prompt, text(80))))
    tree.push(branches.map((prompt) => ask(prompt, 8)))
  }
  return [
    { name: 'short chats', rounds: [first, second] },
    { name: 'long documents', rounds: questions },
    { name: 'shared system prompt', rounds: assistants },
    { name: 'four choices', rounds: [[ask(text(512), 64, 4)], [ask(text(512), 64, 4)]] },
    { name: 'agent tree', rounds: tree },
  ]
}

async function measure(
  engine: Engine,
  work: Work,
  sharing: 'off' | 'on',
): Promise<Omit<KvEngineResult, 'work' | 'sharing'>> {
  const before = await engine.snapshot()
  let peakBytes = 0
  const look = ({ map }: EngineAnswers['map']): void => {
    peakBytes = Math.max(peakBytes, (map.pages.live + map.pages.shared) * map.pageBytes)
  }
  const ask = (): void => void engine.ask({ kind: 'map' }).then(look, () => {})
  const timer = setInterval(ask, LOOK_MS)
  const started = performance.now()
  try {
    for (const round of work.rounds) {
      await Promise.all(round.map((request) => answer(engine, request, sharing)))
    }
  } finally {
    clearInterval(timer)
  }
  const seconds = (performance.now() - started) / 1000
  const after = await engine.snapshot()
  const asked = work.rounds.flat().map(({ prompt, choices }) => prompt.length * choices)
  return {
    seconds,
    peakBytes,
    promptTokens: asked.reduce((a, b) => a + b, 0),
    foundTokens: after.prefixHits - before.prefixHits,
    computedTokens: after.promptTokens - before.promptTokens,
    outputTokens: after.outputTokens - before.outputTokens,
  }
}

/** With sharing off, choices are requests of their own, as above an engine that cannot fork. */
async function answer(engine: Engine, { prompt, output, choices }: Ask, sharing: 'off' | 'on') {
  const request = {
    requestId: 'bench',
    tenant: 'bench',
    prompt,
    sampling: { ...GREEDY, temperature: choices > 1 ? 0.8 : 0 },
    maxTokens: output,
    stopTokens: [],
    topLogprobs: undefined,
  }
  const ends: Promise<void>[] = []
  const list = Array.from({ length: choices }, (_, i) => {
    const { promise, resolve, reject } = Promise.withResolvers<void>()
    ends.push(promise)
    const sampling = { ...request.sampling, seed: i }
    const sink = {
      onToken: () => {},
      onFinish: (_reason: string, _count: number, error: Error | undefined) =>
        error ? reject(error) : resolve(),
    }
    return { sampling, sink }
  })
  if (sharing === 'on') engine.submitChoices(request, list)
  else for (const { sampling, sink } of list) engine.submit({ ...request, sampling }, sink)
  await Promise.all(ends)
}
