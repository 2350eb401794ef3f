// Owns the engine thread: it takes messages between steps, runs steps while there is work, gives
// idle memory back, and sleeps otherwise. Entry point of a worker.

import { parentPort, receiveMessageOnPort, workerData } from 'node:worker_threads'
import { present } from '../assert.ts'
import type { Backend } from '../backends/backend.ts'
import { toLatticeError } from '../errors.ts'
import type { TokenLogprobs } from './api.ts'
import { EngineCore } from './core.ts'
import type { EngineThreadOptions, FinishMessage, FromEngine, ToEngine } from './messages.ts'

const port = present(parentPort, 'the parent thread')
const options = workerData as EngineThreadOptions
const signal = new Int32Array(options.signal)

let tokens: number[] = []
let logprobs: Map<number, TokenLogprobs> | undefined
let finished: FinishMessage[] = []

function say(message: FromEngine): void {
  port.postMessage(message)
}

function flush(): void {
  if (tokens.length === 0 && finished.length === 0) return
  say({ kind: 'tokens', tokens: Int32Array.from(tokens), logprobs, finished })
  tokens = []
  logprobs = undefined
  finished = []
}

interface Opened {
  backend: Backend
  variant: string
  repackedBytes: Record<string, number>
}

/** Only the chosen backend's code is loaded. */
async function openBackend(): Promise<Opened> {
  const choice = options.backend
  if (choice.kind === 'null') {
    const { NullBackend } = await import('../backends/null/backend.ts')
    const backend = new NullBackend({ ...options, ...choice })
    return { backend, variant: 'null', repackedBytes: {} }
  }
  const [{ CpuBackend }, { openModel }] = await Promise.all([
    import('../backends/cpu/backend.ts'),
    import('../model/load.ts'),
  ])
  const backend = new CpuBackend(openModel(choice.modelPath), { ...options, cpus: choice.cpus })
  const repackedBytes = Object.fromEntries(backend.weights.repackedBytes)
  return { backend, variant: backend.variant, repackedBytes }
}

function makeCore(backend: Backend, kvPages: number): EngineCore {
  const { pageBytes } = backend.kv.layout.shape
  const prefixPages = Math.floor((options.prefixCacheBytes ?? 0) / pageBytes)
  return new EngineCore(
    backend,
    {
      maxSequences: options.maxSequences,
      kvPages,
      prefixPages,
      prefixEviction: options.prefixEviction,
      prefixOutput: options.prefixCacheOutput,
    },
    {
      onStart(id, cachedTokens) {
        say({ kind: 'started', id, cachedTokens })
      },
      onToken(id, token, chosen) {
        if (chosen) (logprobs ??= new Map()).set(tokens.length / 2, chosen)
        tokens.push(id, token)
      },
      onFinish(id, reason, outputTokens, error) {
        finished.push({ id, reason, outputTokens, error: error?.toJSON() })
      },
    },
    () => performance.now(),
  )
}

/** How old the client's last snapshot may be when a step begins. */
const SNAPSHOT_AGE_MS = 500

/** Returns when the engine is closed. */
function run(core: EngineCore): void {
  let publishedMs = -Infinity
  for (;;) {
    const seen = Atomics.load(signal, 0)
    for (let item = receiveMessageOnPort(port); item; item = receiveMessageOnPort(port)) {
      const message = item.message as ToEngine
      if (message.kind === 'submit') {
        core.submitChoices(message.ids, message.request, message.samplings)
      } else if (message.kind === 'abort') core.abort(message.id)
      else if (message.kind === 'close') return
      else if (message.kind === 'ask') {
        const answer = core.answer(message.question)
        say({ kind: 'answer', ticket: message.ticket, answer })
      } else say({ kind: 'snapshot', ticket: message.ticket, snapshot: core.snapshot() })
    }
    if (!core.idle && performance.now() - publishedMs > SNAPSHOT_AGE_MS) {
      say({ kind: 'snapshot', ticket: 0, snapshot: core.snapshot() })
      publishedMs = performance.now()
    }
    const worked = core.step()
    flush()
    if (!worked) Atomics.wait(signal, 0, seen, core.settle())
  }
}

let opened: Opened | undefined
try {
  opened = await openBackend()
  const { backend, variant, repackedBytes } = opened
  const { layout } = backend.kv
  const kvPages = Math.floor(options.kvBytes / layout.shape.pageBytes)
  const core = makeCore(backend, kvPages)
  say({ kind: 'ready', facts: { variant, repackedBytes, layout, kvPages } })
  run(core)
} catch (thrown) {
  flush()
  say({ kind: 'failed', error: toLatticeError(thrown).toJSON() })
}
opened?.backend.close()
port.close()
