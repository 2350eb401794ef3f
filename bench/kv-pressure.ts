// Owns the measurement of an engine whose KV memory is a part of what its load needs: the same
// requests with all the memory they want and with less of it, by each way of making room. On the
// null backend a model of costs moves the clock; with --model a real engine answers.
//   node bench/kv-pressure.ts [--share 0.25] [--sequences 64] [--requests 200] [--json]
//     [--stop N]: answers end at one of N of 512 tokens: nobody knows how long they will be
//   node bench/kv-pressure.ts --model MODEL [--offload 2G] [--threads N] …

import { parseArgs } from 'node:util'
import { NullBackend } from '../src/backends/null/backend.ts'
import { NullTier } from '../src/backends/null/tier.ts'
import { GREEDY, type EngineSnapshot, type SequenceRequest } from '../src/engine/api.ts'
import { EngineCore } from '../src/engine/core.ts'
import type { CoreOptions } from '../src/engine/core-contract.ts'
import { RandomStream } from '../src/engine/sampler-random.ts'
import { type EngineOptions, startEngine } from '../src/engine/start.ts'
import { STEP_TOKENS_MAX_DEFAULT } from '../src/limits.ts'
import { parseSize } from '../src/cli/parse.ts'
import { resolveModel } from '../src/model/registry.ts'

const { values } = parseArgs({
  options: {
    model: { type: 'string' },
    share: { type: 'string', default: '0.25' },
    sequences: { type: 'string', default: '64' },
    requests: { type: 'string', default: '200' },
    prompt: { type: 'string', default: '300' },
    output: { type: 'string', default: '200' },
    stop: { type: 'string', default: '0' },
    offload: { type: 'string', default: '2G' },
    threads: { type: 'string' },
    seed: { type: 'string', default: '1' },
    json: { type: 'boolean', default: false },
  },
})
const share = Number(values.share)
const maxSequences = Number(values.sequences)
const [promptMax, outputMax] = [Number(values.prompt), Number(values.output)]
const contextLength = promptMax + outputMax

interface Result {
  how: string
  outputTokensPerSecond: number
  seconds: number
  failed: number
  preemptions: number
  offloads: number
  peakPages: number
  /** By request: its tokens, to compare. */
  answers: number[][]
}

/** Lengths are even from a tenth to all of the most. */
function requests(vocab: number): SequenceRequest[] {
  const random = new RandomStream(Number(values.seed))
  const between = (most: number) => Math.ceil(most * (0.1 + 0.9 * random.uniform()))
  return Array.from({ length: Number(values.requests) }, (_, i) => ({
    requestId: `${i}`,
    tenant: 'default',
    prompt: Int32Array.from({ length: between(promptMax) }, () =>
      Math.floor(random.uniform() * vocab),
    ),
    sampling: GREEDY,
    maxTokens: values.stop === '0' ? between(outputMax) : outputMax,
    stopTokens: Array.from({ length: Number(values.stop) }, (_, token) => token),
    topLogprobs: undefined,
  }))
}

/** What a step and a moved page take, in milliseconds: a model of 135M parameters on two cores. */
const COST = { step: 6, prompt: 0.9, decode: 2, context: 0.0004, page: 4096 / (1 << 20) }

function simulate(how: string, core: Omit<CoreOptions, 'maxSequences'>, tier: boolean): Result {
  let nowMs = 0
  const sizes = { vocab: 512, contextLength, maxSequences, stepTokens: STEP_TOKENS_MAX_DEFAULT }
  const backend = new NullBackend({ ...sizes, kv: { layers: 30, rowBytes: 768, pageBytes: 4096 } })
  const { layout } = backend.kv
  let stepMs = 10
  if (tier) {
    const polls = (_ticket: number, _kind: string, columns: number) =>
      1 + Math.round((columns * layout.ranges * COST.page) / stepMs)
    backend.kv.tier = new NullTier(backend.kv, { capacity: 100_000, polls })
  }
  const launch = backend.launch.bind(backend)
  backend.launch = (batch) => {
    launch(batch)
    stepMs = COST.step
    for (let s = 0; s < batch.segments; s++) {
      const count = batch.counts[s] ?? 0
      stepMs +=
        count * ((batch.starts[s] ?? 0) * COST.context + (count > 1 ? COST.prompt : COST.decode))
    }
    nowMs += stepMs
  }
  const list = requests(sizes.vocab)
  const answers: number[][] = list.map(() => [])
  let failed = 0
  const sink = {
    onStart() {},
    onToken: (id: number, token: number) => void answers[id]!.push(token),
    onFinish: (_id: number, reason: string) => void (failed += reason === 'error' ? 1 : 0),
  }
  const engine = new EngineCore(backend, { ...core, maxSequences }, sink, () => nowMs)
  list.forEach((request, id) => engine.submitChoices([id], request, [request.sampling]))
  let peakPages = 0
  while (!engine.idle) {
    if (!engine.step()) nowMs += 0.2
    peakPages = Math.max(peakPages, engine.snapshot().kv.usedPages)
  }
  return result(how, nowMs, failed, peakPages, answers, engine.snapshot())
}

async function measure(how: string, options: Partial<EngineOptions>): Promise<Result> {
  const { id, path } = await resolveModel(values.model)
  const threads = values.threads === undefined ? {} : { threads: Number(values.threads) }
  const { engine } = await startEngine(path, {
    modelId: id,
    device: 'cpu',
    contextLength,
    maxSequences,
    ...threads,
    ...options,
  })
  try {
    const list = requests(engine.model.vocabSize)
    let [failed, peakPages] = [0, 0]
    const watch = setInterval(() => {
      void engine.snapshot().then(({ kv }) => (peakPages = Math.max(peakPages, kv.usedPages)))
    }, 100)
    const start = performance.now()
    const answers = await Promise.all(
      list.map(async (request) => {
        const tokens: number[] = []
        const { promise, resolve } = Promise.withResolvers<void>()
        engine.submit(request, {
          onToken: (token) => void tokens.push(token),
          onFinish: (reason) => {
            failed += reason === 'error' ? 1 : 0
            resolve()
          },
        })
        await promise
        return tokens
      }),
    )
    const ms = performance.now() - start
    clearInterval(watch)
    return result(how, ms, failed, peakPages, answers, await engine.snapshot())
  } finally {
    await engine.close()
  }
}

function result(
  how: string,
  ms: number,
  failed: number,
  peakPages: number,
  answers: number[][],
  { outputTokens, preemptions, tier }: EngineSnapshot,
): Result {
  const outputTokensPerSecond = outputTokens / (ms / 1000)
  const offloads = tier?.offloads ?? 0
  return {
    how,
    outputTokensPerSecond,
    seconds: ms / 1000,
    failed,
    preemptions,
    offloads,
    peakPages,
    answers,
  }
}

async function results(): Promise<Result[]> {
  if (values.model === undefined) {
    const unlimited = simulate('unlimited', { kvPages: 1e9 }, false)
    const kvPages = Math.floor(unlimited.peakPages * share)
    return [
      unlimited,
      simulate('whoever fits, computed again', { kvPages, greedy: true }, false),
      simulate('whoever fits, moved out', { kvPages, greedy: true, comeBack: 'moved' }, true),
      simulate('whoever fits, what costs less', { kvPages, greedy: true }, true),
      simulate('who is expected to fit, computed again', { kvPages }, false),
      simulate('who is expected to fit, what costs less', { kvPages }, true),
    ]
  }
  const unlimited = await measure('unlimited', {})
  const kvMemoryBytes = Math.floor(unlimited.peakPages * share) * 4096
  const bytes = parseSize(values.offload)
  return [
    unlimited,
    await measure('computed again', { kvMemoryBytes }),
    await measure('what costs less', { kvMemoryBytes, kvOffload: { bytes } }),
  ]
}

const all = await results()
const [unlimited] = all as [Result]
const rows = all.map(({ answers, ...row }) => ({
  ...row,
  ofUnlimited: row.outputTokensPerSecond / unlimited.outputTokensPerSecond,
  sameAnswers: answers.filter((tokens, i) => `${tokens}` === `${unlimited.answers[i]}`).length,
}))
if (values.json) console.log(JSON.stringify({ share, maxSequences, contextLength, rows }))
else {
  for (const row of rows) {
    console.log(
      `${row.how.padEnd(42)} ${row.outputTokensPerSecond.toFixed(0).padStart(6)} tokens/s` +
        ` ${(100 * row.ofUnlimited).toFixed(0).padStart(4)} %  ${row.failed} failed,` +
        ` ${row.sameAnswers} of ${all[0]!.answers.length} the same, ${row.preemptions} made room,` +
        ` ${row.offloads} by moving out`,
    )
  }
}
