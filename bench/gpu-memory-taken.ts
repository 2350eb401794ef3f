// Owns the measurement of what becomes of requests when another process (PyTorch's) takes all of a
// GPU's memory that is free: before they come, while they run, and for longer than they wait.
//
//   node bench/gpu-memory-taken.ts MODEL [PYTHON]

import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import { GREEDY } from '../src/engine/api.ts'
import { startEngine } from '../src/engine/start.ts'

const [path = '', python = 'python3'] = process.argv.slice(2)
const PROMPT_TOKENS = 800
const OUTPUT_TOKENS = 256
/** Longer than idle memory stays with the engine. */
const PAUSE_MS = 800

const { engine } = await startEngine(path, {
  modelId: 'model',
  device: 'cuda',
  contextLength: 2048,
  kvMemoryBytes: 20 * 2 ** 30,
  kvIdleReleaseMs: 200,
  maxSequences: 64,
  onStarting: console.log,
})
await ask('alone', 32)
let other = await take(4)
await ask('taken before they come, for 4 s', 32)
await other()
const running = ask('taken while they run, for 3 s', 64)
await pause(60)
other = await take(3)
await running
await other()
other = await take(13)
await ask('taken for 13 s', 4)
await other()
await ask('given back', 4)
await engine.close()

/** Starts the other process. @returns waits until it has ended, and idle memory is given back */
async function take(seconds: number): Promise<() => Promise<void>> {
  await pause(PAUSE_MS)
  const file = join(import.meta.dirname, 'gpu-memory-taken.py')
  const child: ChildProcess = spawn(python, [file, String(seconds)], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const exit = once(child, 'exit')
  child.stdout?.on('data', (chunk) => process.stdout.write(`  the other process ${chunk}`))
  await once(child.stdout!, 'data')
  return async () => {
    await exit
    await pause(PAUSE_MS)
  }
}

function pause(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms))
}

/** So many requests at once, and how they end. */
async function ask(what: string, count: number): Promise<void> {
  const start = performance.now()
  const ends = await Promise.all(Array.from({ length: count }, (_, i) => end(i)))
  const counts = Object.entries(Object.groupBy(ends, (one) => one)).map(
    ([reason, those = []]) => `${those.length} ${reason}`,
  )
  const seconds = ((performance.now() - start) / 1000).toFixed(2)
  const { kv } = await engine.snapshot()
  const limit = `limit ${Math.round((kv.limitPages * kv.pageBytes) / 2 ** 20)} MiB`
  console.log(`${what}: ${counts.join(', ')} after ${seconds} s, ${limit}`)
}

function end(i: number): Promise<string> {
  const prompt = Int32Array.from({ length: PROMPT_TOKENS }, (_, t) => (i * 131 + t * 17) % 40000)
  const request = { requestId: 'r', tenant: 't', prompt, stopTokens: [], topLogprobs: undefined }
  return new Promise((resolve) => {
    engine.submit(
      { ...request, sampling: GREEDY, maxTokens: OUTPUT_TOKENS },
      { onToken: () => {}, onFinish: (reason, _count, error) => resolve(error?.code ?? reason) },
    )
  })
}
