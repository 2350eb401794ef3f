// Owns the measurement of what log-probabilities cost on a GPU: steps of 64 sequences of an 8B
// shape without them, with them from the kernel that chooses tokens, and from logits on the host.
//
//   node bench/gpu-logprobs.ts

import { openCuda } from '../src/backends/cuda/open.ts'
import { GREEDY } from '../src/engine/api.ts'
import { EngineCore } from '../src/engine/core.ts'
import { openModel } from '../src/model/load.ts'

const SEQUENCES = 64
const PROMPT_TOKENS = 64
const OUTPUT_TOKENS = 60
const KV_BYTES = 12 * 2 ** 30

const model = openModel('dummy:llama-3.1-8b')
const sizes = { contextLength: 1024, maxSequences: SEQUENCES, stepTokens: 2048 }
const opened = openCuda(model, { device: 0, ...sizes, kvBytes: KV_BYTES }, console.log)
const { backend } = opened
const takes = backend.takes.bind(backend)
console.log(`start: ${opened.started}`)

measure('(warm-up)', undefined, 'device')
measure('none', undefined, 'device')
for (const where of ['device', 'host'] as const) {
  for (const top of [5, 20]) measure(`the token's and ${top} more, on the ${where}`, top, where)
}
opened.close()

function measure(what: string, topLogprobs: number | undefined, where: 'device' | 'host'): void {
  backend.takes = (params, top) => (where === 'device' || !top) && takes(params, top)
  const kvPages = Math.floor(KV_BYTES / backend.kv.layout.shape.pageBytes)
  let tokens = 0
  const sink = {
    onStart: () => {},
    onToken: () => void tokens++,
    onFinish: (_id: number, reason: string) => {
      if (reason !== 'length') throw new Error(`a sequence ended with ${reason}`)
    },
  }
  const options = { maxSequences: SEQUENCES, kvPages }
  const core = new EngineCore(backend, options, sink, () => performance.now())
  for (let id = 0; id < SEQUENCES; id++) {
    const prompt = Int32Array.from(
      { length: PROMPT_TOKENS },
      (_, i) => (id * 977 + i * 31) % 128000,
    )
    const request = { requestId: 'r', tenant: 't', prompt, stopTokens: [], topLogprobs }
    core.submit(id, { ...request, sampling: GREEDY, maxTokens: OUTPUT_TOKENS })
  }
  const times: number[] = []
  while (!core.idle) {
    const start = performance.now()
    core.step()
    times.push(performance.now() - start)
  }
  times.sort((a, b) => a - b)
  const at = (share: number) => (times[Math.floor(times.length * share)] ?? 0).toFixed(2)
  console.log(`${what}: p50 ${at(0.5)} ms, p95 ${at(0.95)} ms a step, ${tokens} tokens`)
  // The next run's pages are to be this one's no more.
  while (core.settle() !== undefined && backend.kv.residentBytes() > 0);
}
