// Owns the measurement of the whole engine on a GPU: batches of requests from prompt to last token,
// one long prompt, and what growing memory costs a step.

import { assert, present } from '../assert.ts'
import type { SequenceRequest } from '../engine/api.ts'
import { GREEDY } from '../engine/api.ts'
import { EngineCore } from '../engine/core.ts'
import { openCuda, type OpenedCuda } from '../backends/cuda/open.ts'
import { type Quantization, whyNotFp8 } from '../backends/cuda/quantization.ts'
import { dummyModel } from '../model/dummy.ts'
import { type Ceilings, StepWork } from './gpu-floors.ts'
import { type GpuBench, matrixCeiling, median, quantile } from './gpu-measure.ts'
import { profiled, rowKernels } from './gpu-profile.ts'
import { readBandwidth } from './gpu-decode.ts'
import { askPython } from './python-peer.ts'

export const MODEL = 'dummy:llama-3.1-8b'
const CONTEXT = 8448
const STEP_TOKENS = 2048
const SEQUENCES = 256
const KV_BYTES = 44 * 2 ** 30
/** Sequences, and tokens of their prompts. */
type Requests = readonly [sequences: number, promptTokens: number]
const LOADS: readonly Requests[] = [
  [64, 512],
  [128, 512],
  [256, 64],
]
const OUTPUT_TOKENS = 128

interface Load {
  sequences: number
  promptTokens: (i: number) => number
  outputTokens: number
}

interface Served {
  ms: number
  outputTokens: number
  /** Between the ends of steps that only decode. */
  decodeMs: number[]
  /** Of the thread that runs the engine, in those steps, waiting excluded. */
  cpuMs: number[]
  idleShare: number
  /** Of KV memory, when the last sequence has begun to decode. */
  waste: number
}

/** The part `serve` of `lattice bench gpu`. */
export function benchServe(bench: GpuBench): void {
  const { row } = bench
  const teraflops = matrixCeiling(bench)
  const readGBs = readBandwidth(bench.device, bench.modules)
  row('a matrix product, 8,192 cubed', teraflops, 'TFLOP/s')
  row('memory read by a plain kernel', readGBs, 'GB/s')
  const rates = withModel(bench, undefined, (gpu) => {
    const prompt = { sequences: 1, promptTokens: () => 8192, outputTokens: 1 }
    serve(gpu, prompt)
    const { ms } = serve(gpu, prompt)
    const share = (100 * prefillFlops(8192)) / ms / 1e9 / teraflops
    row(`${MODEL}: a prompt of 8,192`, ms, 'ms')
    row(`${MODEL}: the same, of the product's rate`, share, '%')
    profilePrompts(gpu, { teraflops, readGBs }, row)
    const rates = LOADS.map(([sequences, prompt]) => growth(gpu, sequences, prompt, row))
    const mixed = { sequences: 128, promptTokens: (i: number) => 32 + ((i * 397) % 1900) }
    const { waste } = serve(gpu, { ...mixed, outputTokens: 64 })
    row(`${MODEL}: 128 of mixed lengths, KV memory unused`, 100 * waste, '%')
    return rates
  })
  // They need the memory that was given back.
  const load = present(LOADS[0], 'a load')
  compare(load, { bf16: present(rates[0], 'a rate'), fp8: fp8Rate(bench, load) }, row)
}

/** Output tokens a second of the load with weights of 8 bits; undefined where there are none. */
function fp8Rate(bench: GpuBench, [sequences, promptTokens]: Requests): number | undefined {
  if (whyNotFp8(bench.device.info) !== undefined) return undefined
  return withModel(bench, 'fp8', (gpu) => {
    const load = { sequences, promptTokens: () => promptTokens, outputTokens: OUTPUT_TOKENS }
    serve(gpu, load)
    const { outputTokens, ms } = serve(gpu, load)
    return (outputTokens / ms) * 1e3
  })
}

/**
 * Measures on the model, ready for all loads. It is not closed after an error: a GPU that does not
 * go on would hold up the error's report.
 */
export function withModel<Result>(
  bench: GpuBench,
  quantization: Quantization | undefined,
  measure: (gpu: OpenedCuda) => Result,
): Result {
  const gpu = openCuda(dummyModel(MODEL), {
    device: bench.device.info.index,
    contextLength: CONTEXT,
    maxSequences: SEQUENCES,
    stepTokens: STEP_TOKENS,
    kvBytes: KV_BYTES,
    // What has been mapped stays where it is: the second run of a load finds it there.
    kvIdleReleaseMs: Infinity,
    ...(quantization && { quantization }),
  })
  const result = measure(gpu)
  gpu.close()
  return result
}

/** The kernels of a step that is full of prompts, as it comes when many requests arrive. */
export function profilePrompts(
  gpu: OpenedCuda,
  ceilings: Ceilings,
  row: GpuBench['row'],
  narrow: ReadonlySet<string> = new Set(),
): void {
  const { backend, device } = gpu
  const { forward } = backend
  const sequences = 4
  const promptTokens = STEP_TOKENS / sequences
  const load = { sequences, promptTokens: () => promptTokens, outputTokens: 1 }
  const { decodeMs } = serve(gpu, load)
  assert(decodeMs.length === 0, 'the last step was that of the prompts')
  const shape = { tokens: STEP_TOKENS, outputs: sequences, singles: 0, segments: sequences }
  const pairs = (sequences * promptTokens * (promptTokens + 1)) / 2
  const rows = { tokens: STEP_TOKENS, outputs: sequences, seen: STEP_TOKENS, pairs }
  const work = new StepWork(forward.mixed.program, dummyModel(MODEL).tensors, narrow, rows)
  const kernels = profiled(device.driver, forward, forward.mixed, shape, work, ceilings)
  rowKernels(kernels, `${MODEL}, ${sequences} prompts of ${promptTokens}`, row)
}

/** Whole requests against Hugging Face transformers', right after ours. */
function compare(
  [sequences, promptTokens]: Requests,
  rates: Readonly<Record<string, number | undefined>>,
  row: GpuBench['row'],
): void {
  const { config } = dummyModel(MODEL)
  const peer = askPython<{ tokensPerSecond: number[] }>('generate-batch.py', 'transformers', {
    // One that counts, after one that warms up: each takes 20 s.
    ...{ sequences, promptTokens, outputTokens: OUTPUT_TOKENS, runs: 1 },
    config: {
      ...{ hidden_size: config.hidden, intermediate_size: config.feedForward },
      ...{ num_hidden_layers: config.layers, num_attention_heads: config.heads },
      ...{ num_key_value_heads: config.kvHeads, vocab_size: config.vocab },
      ...{ max_position_embeddings: 16_384, rope_theta: 500_000 },
    },
  })
  if (!peer) return
  const theirs = median(peer.tokensPerSecond)
  for (const [type, rate] of Object.entries(rates)) {
    if (rate === undefined) continue
    const name = `${MODEL}, ${type}, ${sequences} × (${promptTokens} + ${OUTPUT_TOKENS})`
    row(`${name}: output`, rate, 'tok/s', theirs, "transformers' generate_batch in bf16")
  }
}

/**
 * The same load twice: pages are mapped as it grows, then they are all there.
 * @returns output tokens a second of the second
 */
export function growth(
  gpu: OpenedCuda,
  sequences: number,
  prompt: number,
  row: GpuBench['row'],
): number {
  const load = { sequences, promptTokens: () => prompt, outputTokens: OUTPUT_TOKENS }
  const name = `${MODEL}, ${sequences} × (${prompt} + ${OUTPUT_TOKENS})`
  serve(gpu, { ...load, outputTokens: 4 })
  const late = gpu.backend.kv
  const grown = serve(gpu, load)
  const there = serve(gpu, load)
  const rate = (there.outputTokens / there.ms) * 1e3
  row(`${name}: output`, rate, 'tok/s')
  row(`${name}: output, memory growing`, (grown.outputTokens / grown.ms) * 1e3, 'tok/s')
  row(`${name}: a decode step`, median(there.decodeMs) * 1e3, 'µs')
  const p99 = (served: Served) => quantile(served.decodeMs, 0.99) * 1e3
  row(`${name}: p99, memory growing`, p99(grown), 'µs', p99(there), 'all mapped')
  row(`${name}: CPU a step`, median(there.cpuMs) * 1e3, 'µs')
  const least = quantile(there.cpuMs, 0.1) * 1e3
  row(`${name}: CPU a step, a tenth is below`, least, 'µs')
  row(`${name}: GPU between steps`, 100 * there.idleShare, '%')
  if ('counters' in late) {
    const { lateSteps, lateMs } = late.counters as { lateSteps: number; lateMs: number }
    row(`${name}: steps that waited for pages`, lateSteps, `of all, ${lateMs.toFixed(1)} ms`)
  }
  return rate
}

/** Runs a load to its end. */
export function serve({ backend }: OpenedCuda, load: Load): Served {
  const { pageBytes } = backend.kv.layout.shape
  let tokens = 0
  /** Sequences that have no token yet: prompts are not over. */
  let silent = load.sequences
  const spoke = new Uint8Array(load.sequences)
  const onToken = (id: number): void => {
    tokens++
    if (spoke[id] === 0) silent--
    spoke[id] = 1
  }
  const sink = { onStart() {}, onToken, onFinish() {} }
  const core = new EngineCore(
    backend,
    { maxSequences: SEQUENCES, kvPages: Math.floor(KV_BYTES / pageBytes), greedy: true },
    sink,
    () => performance.now(),
  )
  let random = 12345
  const next = (): number => (random = (Math.imul(random, 1103515245) + 12345) >>> 0) % 100_000
  for (let i = 0; i < load.sequences; i++) {
    core.submit(i, requestOf(Int32Array.from({ length: load.promptTokens(i) }, next), load))
  }
  const { state } = backend.forward
  const decodeMs: number[] = []
  const cpuMs: number[] = []
  let waste = 0
  let idleMs = 0
  let decodingMs = 0
  const start = performance.now()
  let before = start
  let decoded = 0
  while (!core.idle) {
    const waitedMs = state.waitedMs
    const idleBefore = state.idleMs
    const began = performance.now()
    core.step()
    const now = performance.now()
    // The step that is taken in was queued a step ago: prompts must be over by then. What a step
    // costs the CPU is to be its own: nothing that walks through memory comes between two.
    decoded = silent === 0 ? decoded + 1 : 0
    if (decoded > 2 && !core.idle) {
      decodeMs.push(now - before)
      cpuMs.push(now - began - (state.waitedMs - waitedMs))
      idleMs += state.idleMs - idleBefore
      decodingMs += now - before
    }
    if (decoded === 2) waste = wasted(core)
    before = now
  }
  const ms = performance.now() - start
  // Nothing may be left of this core's account: the next one begins with none.
  const clock = new Int32Array(new SharedArrayBuffer(4))
  for (let wait = core.settle(); wait !== undefined; wait = core.settle()) {
    Atomics.wait(clock, 0, 0, wait)
  }
  return {
    ms,
    outputTokens: tokens,
    decodeMs,
    cpuMs,
    idleShare: idleMs / Math.max(1e-9, decodingMs),
    waste,
  }
}

function wasted(core: EngineCore): number {
  const { kv, sequences } = core.snapshot()
  const live = sequences.reduce((sum, { bytes }) => sum + bytes, 0)
  return 1 - live / (kv.usedPages * kv.pageBytes)
}

function requestOf(prompt: Int32Array, { outputTokens }: Load): SequenceRequest {
  return {
    requestId: 'bench',
    tenant: 'default',
    prompt,
    maxTokens: outputTokens,
    sampling: GREEDY,
    stopTokens: [],
    topLogprobs: undefined,
  }
}

/**
 * Of matrices and attention, without what sees one token only: the output matrix, and of the last
 * block all but keys and values.
 */
export function prefillFlops(tokens: number): number {
  const { layers, hidden, heads, kvHeads, headDim, feedForward } = dummyModel(MODEL).config
  const keysAndValues = 2 * hidden * kvHeads * headDim
  const weights = keysAndValues + 2 * hidden * heads * headDim + 3 * hidden * feedForward
  const attention = (4 * heads * headDim * tokens * tokens) / 2
  return (layers - 1) * (2 * weights * tokens + attention) + 2 * keysAndValues * tokens
}
