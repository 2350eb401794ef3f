// Owns the measurement of KV memory on a real model: how much more is resident than the tokens
// need, and how long it takes until all of it is back with the kernel.
//   node bench/kv-waste.ts [--model MODEL] [--sequences 32] [--min 50] [--max 2000] [--json]

import { readdirSync, readlinkSync, statSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { NullBackend } from '../src/backends/null/backend.ts'
import { GREEDY, type Engine, type EngineSnapshot } from '../src/engine/api.ts'
import { EngineCore } from '../src/engine/core.ts'
import { RandomStream } from '../src/engine/sampler-random.ts'
import { startEngine } from '../src/engine/start.ts'
import { STEP_TOKENS_MAX_DEFAULT } from '../src/limits.ts'
import { resolveModel } from '../src/model/registry.ts'

const { values } = parseArgs({
  options: {
    model: { type: 'string' },
    sequences: { type: 'string', default: '32' },
    min: { type: 'string', default: '50' },
    max: { type: 'string', default: '2000' },
    seed: { type: 'string', default: '1' },
    json: { type: 'boolean', default: false },
  },
})
const sequences = Number(values.sequences)
const [min, max] = [Number(values.min), Number(values.max)]
/** Tokens that every sequence has generated, at least, when waste is measured. */
const DECODED = 8
const contextLength = max + sequences + 4 * DECODED

/** The kernel's own count, as anybody who may look into this process can read it. */
function residentBytes(): number {
  const folder = '/proc/self/fd'
  for (const fd of readdirSync(folder)) {
    const path = `${folder}/${fd}`
    try {
      if (readlinkSync(path).startsWith('/memfd:lattice-kv')) return statSync(path).blocks * 512
    } catch {
      // The folder's own descriptor is closed by now.
    }
  }
  throw new Error('this process has no KV memory')
}

function requestOf(prompt: Int32Array, maxTokens: number) {
  const same = { requestId: 'bench', tenant: 'default', sampling: GREEDY, topLogprobs: undefined }
  return { ...same, prompt, maxTokens, stopTokens: [] }
}

/** The step in which each prompt has its first output: found by running them without compute. */
function firstOutputSteps(prompts: readonly Int32Array[]): number[] {
  const sizes = { contextLength, maxSequences: sequences, stepTokens: STEP_TOKENS_MAX_DEFAULT }
  const steps: number[] = []
  let step = 0
  const sink = { onStart() {}, onToken: (id: number) => (steps[id] ??= step), onFinish() {} }
  const options = { maxSequences: sequences, kvPages: Infinity }
  const core = new EngineCore(new NullBackend({ vocab: 4, ...sizes }), options, sink, () => 0)
  prompts.forEach((prompt, id) =>
    core.submit(
      id,
      requestOf(
        prompt.map(() => 0),
        sequences * 8,
      ),
    ),
  )
  while (Object.keys(steps).length < prompts.length && core.step()) step++
  return steps
}

/** Runs all prompts at once so that they end in about the same step: the hardest to give back. */
async function run(engine: Engine, prompts: readonly Int32Array[]): Promise<EngineSnapshot> {
  const first = firstOutputSteps(prompts)
  const last = Math.max(...first) + 3 * DECODED
  const outputs = prompts.map(() => 0)
  const ends = prompts.map((prompt, id) => {
    const { promise, resolve, reject } = Promise.withResolvers<void>()
    engine.submit(requestOf(prompt, last - first[id]!), {
      onToken: () => outputs[id]!++,
      onFinish: (_reason, _count, error) => (error ? reject(error) : resolve()),
    })
    return promise
  })
  const ended = Promise.all(ends)
  while (Math.min(...outputs) < DECODED) await Promise.race([sleep(10), ended])
  const snapshot = await engine.snapshot()
  await ended
  return snapshot
}

const { id, path } = await resolveModel(values.model)
const { engine } = await startEngine(path, {
  modelId: id,
  device: 'cpu',
  maxSequences: sequences,
  contextLength,
})
const random = new RandomStream(Number(values.seed))
const between = (low: number, high: number) => low + Math.floor(random.uniform() * (high - low + 1))
const prompts = Array.from({ length: sequences }, () =>
  Int32Array.from({ length: between(min, max) }, () => between(0, engine.model.vocabSize - 1)),
)
const { sequences: running, kv } = await run(engine, prompts)
const endedMs = performance.now()
const heldBytes = residentBytes()
let nowMs = endedMs
for (let bytes = heldBytes; bytes > 0 && nowMs - endedMs < 10_000; nowMs = performance.now()) {
  await sleep(1)
  bytes = residentBytes()
}
await engine.close()

const live = running.reduce((sum, { bytes }) => sum + bytes, 0)
const result = {
  model: id,
  sequences: running.length,
  seed: Number(values.seed),
  live_tokens: running.reduce((sum, { kvTokens }) => sum + kvTokens, 0),
  live_bytes: live,
  resident_bytes: kv.residentBytes,
  waste_pct: Number(((kv.residentBytes / live - 1) * 100).toFixed(3)),
  released_bytes: heldBytes,
  release_ms: Number((nowMs - endedMs).toFixed(1)),
}
if (values.json) console.log(JSON.stringify(result))
else for (const [key, value] of Object.entries(result)) console.log(key.padEnd(16), value)
