// Owns the engine thread: it takes messages between steps, runs steps while there is work, gives
// idle memory back, and sleeps otherwise. Entry point of a worker.

import { parentPort, receiveMessageOnPort, workerData } from 'node:worker_threads'
import { present } from '../assert.ts'
import { CpuBackend } from '../backends/cpu/backend.ts'
import { toLatticeError } from '../errors.ts'
import { openModel } from '../model/load.ts'
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

function run(core: EngineCore): void {
  for (;;) {
    const seen = Atomics.load(signal, 0)
    for (let item = receiveMessageOnPort(port); item; item = receiveMessageOnPort(port)) {
      const message = item.message as ToEngine
      if (message.kind === 'submit') core.submit(message.id, message.request)
      else if (message.kind === 'abort') core.abort(message.id)
      else if (message.kind === 'close') return
      else say({ kind: 'snapshot', ticket: message.ticket, snapshot: core.snapshot() })
    }
    const worked = core.step()
    flush()
    if (!worked) Atomics.wait(signal, 0, seen, core.settle())
  }
}

let backend: CpuBackend | undefined
try {
  const model = openModel(options.modelPath)
  backend = new CpuBackend(model, options)
  const { layout } = backend.kv
  const kvPages = Math.floor(options.kvBytes / layout.shape.pageBytes)
  const core = new EngineCore(
    backend,
    { maxSequences: options.maxSequences, kvPages },
    {
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
  say({
    kind: 'ready',
    facts: {
      variant: backend.variant,
      repackedBytes: Object.fromEntries(backend.weights.repackedBytes),
      layout,
      kvPages,
    },
  })
  run(core)
  backend.close()
} catch (thrown) {
  flush()
  say({ kind: 'failed', error: toLatticeError(thrown).toJSON() })
}
port.close()
