// Owns the measurement of decoding on a GPU: time a step against the time that reading weights and
// KV takes at the bandwidth measured in the same run, what the CPU spends on a step, and how long
// the GPU waits between steps.

import { present } from '../assert.ts'
import { gpuKvLayout } from '../backends/cuda/kv-layout.ts'
import type { CudaDevice } from '../backends/cuda/device.ts'
import { e4m3Weights } from '../backends/cuda/e4m3.ts'
import { CudaForward } from '../backends/cuda/forward.ts'
import { BATCH_TOKENS_MAX } from '../backends/cuda/batch-plan.ts'
import { Kernels } from '../backends/cuda/kernels.ts'
import type { ModuleCache } from '../backends/cuda/module-cache.ts'
import type { Quantization } from '../backends/cuda/quantization.ts'
import { KernelLaunch } from '../ffi/kernel-launch.ts'
import { dummyModel } from '../model/dummy.ts'
import { GREEDY } from '../engine/api.ts'
import type { Model } from '../model/model.ts'
import { StepWork } from './gpu-floors.ts'
import { type GpuBench, matrixCeiling, median } from './gpu-measure.ts'
import { type KernelTime, profiled, rowKernels } from './gpu-profile.ts'

export interface DecodeCase {
  batch: number
  /** Tokens of each sequence before the first measured step. */
  context: number
  steps: number
}

export interface DecodeOptions {
  prefetchBytes?: number
  overlap?: boolean
  wholeSteps?: boolean
  quantization?: Quantization
  /** Also times each kind of kernel by itself, beside what it takes at TFLOP/s of products. */
  profile?: { teraflops: number }
}

interface DecodeResult extends DecodeCase {
  /** Median of the time between the ends of two steps. */
  stepUs: number
  /** Share of the time that the GPU was between steps, by its own clock. */
  idleShare: number
  /** Reading weights and KV at `readGBs`. */
  rooflineUs: number
  /** Of the thread that queues steps, a step, waiting excluded. */
  cpuUs: number
  profile: readonly KernelTime[]
  /** Of few sequences, why the step is not one kernel. */
  whyNotWhole: string | undefined
}

const PAGE_BYTES = 2 << 20
const WARM_STEPS = 5

/** What fits 80 GB: an 8B model, and as much context as the rest of the memory holds. */
const MODEL = 'dummy:llama-3.1-8b'
const CASES: readonly DecodeCase[] = [
  { batch: 1, context: 1024, steps: 60 },
  { batch: 4, context: 1024, steps: 40 },
  { batch: 64, context: 576, steps: 40 },
  { batch: 256, context: 1600, steps: 24 },
]

/** The part `decode` of `lattice bench gpu`. */
export function benchDecodeSteps(bench: GpuBench): void {
  const { device, modules, row } = bench
  const readGBs = readBandwidth(device, modules)
  const teraflops = matrixCeiling(bench)
  row('memory read by a plain kernel', readGBs, 'GB/s')
  row('a matrix product, 8,192 cubed', teraflops, 'TFLOP/s')
  const model = dummyModel(MODEL)
  const options = { profile: { teraflops } }
  for (const of of CASES) {
    const one = benchDecode(device, modules, model, of, readGBs, options)
    const name = `${MODEL}, ${one.batch} × ${one.context}`
    const why = one.whyNotWhole
    const how = why === undefined ? '' : ` (a kernel a product: ${why})`
    row(`${name}: step${how}`, one.stepUs, 'µs', one.rooflineUs, 'reading weights and KV')
    row(`${name}: GPU between steps`, 100 * one.idleShare, '%')
    row(`${name}: CPU a step`, one.cpuUs, 'µs')
    rowKernels(one.profile, name, row)
    if (of.batch > BATCH_TOKENS_MAX) continue
    const apart = benchDecode(device, modules, model, of, readGBs, { wholeSteps: false })
    row(`${name}: step, a kernel a product`, apart.stepUs, 'µs', apart.rooflineUs)
  }
}

/** Bytes that a decode step reads of the weights: all but the embedding's other rows. */
function weightBytes({ tensors }: Model, narrow: ReadonlySet<string>): number {
  const tied = !tensors.has('output.weight')
  return [...tensors.values()]
    .filter(({ name }) => tied || name !== 'token_embd.weight')
    .reduce((sum, { name, byteLength }) => sum + byteLength / (narrow.has(name) ? 2 : 1), 0)
}

/** Gigabytes a second that a plain kernel reads, the best of a few grids. */
export function readBandwidth(device: CudaDevice, modules: ModuleCache): number {
  const { driver, info } = device
  const kernels = new Kernels(device, modules)
  const bytes = 8 * 2 ** 30
  const memory = driver.allocate(bytes)
  const stream = driver.createStream()
  const fill = new KernelLaunch(kernels.find('step.cu', 'fillRandom'), ['u64', 'u64', 'u32', 'f32'])
  driver.launch(
    fill
      .setAll(memory, bytes / 2, 1, 1)
      .grid(2048)
      .threads(256),
    stream,
  )
  const read = new KernelLaunch(kernels.find('read.cu', 'readAll'), ['u64', 'u64', 'u64'])
  read.setAll(memory, bytes / 16, memory).threads(512)
  const best = [2, 4, 8].map((waves) => {
    read.grid(info.multiprocessors * waves)
    const ms = medianMs(device, stream, 7, () => driver.launch(read, stream))
    return bytes / ms / 1e6
  })
  kernels.close()
  driver.destroyStream(stream)
  driver.free(memory)
  return Math.max(...best)
}

/** Measures a case on weights and KV of its own, which are random. */
export function benchDecode(
  device: CudaDevice,
  modules: ModuleCache,
  model: Model,
  of: DecodeCase,
  readGBs: number,
  options: DecodeOptions = {},
): DecodeResult {
  const { driver } = device
  const tokens = of.context + of.steps + WARM_STEPS + 2
  const layout = gpuKvLayout(model.config, tokens, PAGE_BYTES)
  const bytes = layout.slotBytes * of.batch
  const address = driver.allocate(bytes)
  const forward = new CudaForward(model, {
    device,
    modules,
    kv: { address, layout, regions: of.batch },
    maxSequences: of.batch,
    stepTokens: of.batch,
    ...options,
  })
  forward.fillRandom(address, bytes / 2, 7, 1)
  driver.synchronize()
  const result = decode(forward, of)
  const kvBytes = of.batch * (of.context + WARM_STEPS + of.steps / 2) * layout.tokenStride
  const narrow = options.quantization ? e4m3Weights(model, device.info) : new Set<string>()
  const rooflineUs = (weightBytes(model, narrow) + kvBytes) / readGBs / 1e3
  const shape = { tokens: of.batch, outputs: of.batch, singles: of.batch, segments: 0 }
  const { decoding } = forward
  const seen = of.batch * (of.context + WARM_STEPS + of.steps)
  const rows = { tokens: of.batch, outputs: of.batch, seen, pairs: seen }
  const work = new StepWork(decoding.program, model.tensors, narrow, rows)
  const profile = options.profile
    ? profiled(device.driver, forward, decoding, shape, work, { readGBs, ...options.profile })
    : []
  const whyNotWhole = decoding.whyNotWhole(of.batch)
  forward.close()
  driver.free(address)
  return { ...of, ...result, rooflineUs, profile, whyNotWhole }
}

function decode(forward: CudaForward, { batch, context, steps }: DecodeCase) {
  const { state } = forward
  // Otherwise every row's log-probabilities are reported, too: a table of zeros asks for them.
  const none = new Int32Array()
  const greedy = { params: GREEDY, prompt: none, output: none }
  for (let slot = 0; slot < batch; slot++) forward.sampling.begin(slot, greedy, forward.stream)
  const bucket = forward.bucketOf(batch)
  let position = context
  const queue = (): number => {
    for (let i = 0; i < bucket; i++) {
      const real = i < batch
      state.setRow(i, real ? -1 : 0, position, real ? i : -1, i, i)
    }
    position++
    return forward.decode(batch)
  }
  for (let i = 0; i < WARM_STEPS; i++) state.wait(queue())
  const ends: number[] = []
  const idle: number[] = []
  const busy: number[] = []
  for (let i = 0; i < steps; i++) {
    const start = performance.now()
    const step = queue()
    const queued = performance.now() - start
    // One step ahead: this one is queued before the last one's tokens are known.
    if (i === 0) continue
    state.wait(step - 1)
    const waited = performance.now()
    busy.push(queued + takeTokens(state.tokensOf(step - 1), batch) - waited)
    ends.push(waited)
    idle.push(state.idleMs)
  }
  state.wait(state.steps - 1)
  const gaps = ends.slice(1).map((end, i) => end - present(ends[i], 'an end'))
  const stepUs = median(gaps) * 1e3
  const spanMs = present(ends.at(-1), 'an end') - present(ends[0], 'an end')
  const idleShare = (present(idle.at(-1), 'a time') - present(idle[0], 'a time')) / spanMs
  const cpuUs = median(busy) * 1e3
  return { stepUs, idleShare, cpuUs }
}

/** Looks at every token, as an engine would; gives the time when it is done. */
function takeTokens(tokens: Int32Array, count: number): number {
  for (let i = 0; i < count; i++) {
    if ((tokens[i] ?? -1) < 0) throw new Error(`row ${i} has no token: logits are not numbers`)
  }
  return performance.now()
}

function medianMs(device: CudaDevice, stream: number, runs: number, run: () => void): number {
  const { driver } = device
  const events = [driver.createEvent(true), driver.createEvent(true)] as const
  const times: number[] = []
  for (let i = 0; i < runs + 2; i++) {
    driver.recordEvent(events[0], stream)
    run()
    driver.recordEvent(events[1], stream)
    driver.synchronizeEvent(events[1])
    if (i >= 2) times.push(driver.elapsedMs(...events))
  }
  for (const event of events) driver.destroyEvent(event)
  return median(times)
}
