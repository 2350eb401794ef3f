// Owns a model on a GPU: weights, activations, step state, and the two ways a step is queued: as a
// graph that was captured once for a number of decoding sequences, or kernel by kernel when
// prompts are among its tokens. Nothing waits here but who asks for a step's tokens.

import { type CublasLt, loadCublasLt } from '../../ffi/cublaslt.ts'
import { type ArgumentKind, KernelLaunch } from '../../ffi/kernel-launch.ts'
import { viewMemory } from '../../ffi/libc.ts'
import type { KvLayout } from '../../kv/layout.ts'
import { programFor } from '../../model/arch/programs.ts'
import type { Model, RopeConfig } from '../../model/model.ts'
import type { Program } from '../../model/program.ts'
import { CudaAttention } from './attention.ts'
import { bucketOf, bucketsUpTo } from './buckets.ts'
import { Choices, choicesPath } from './choices.ts'
import type { CudaDevice } from './device.ts'
import { E4m3 } from './e4m3-rows.ts'
import { fuse } from './fuse.ts'
import { type KernelFinder, Kernels } from './kernels.ts'
import { Lowering } from './lower.ts'
import type { Attention, HopperUse, LowerContext, StepShape } from './lower-context.ts'
import { LogprobRing } from './logprobs.ts'
import { Matmuls, paddedRows } from './matmul.ts'
import type { ModuleCache } from './module-cache.ts'
import type { Quantization } from './quantization.ts'
import { ropeTable } from './rope-table.ts'
import { SampleLaunch } from './sample-launch.ts'
import { SamplingTable } from './sampling.ts'
import type { StartTimes } from './start-times.ts'
import { PLACES, StepState } from './state.ts'
import { tuneProducts } from './tuning.ts'
import { DeviceWeights } from './weights.ts'

export interface ForwardOptions {
  device: CudaDevice
  modules: ModuleCache
  /** Where region 0 lies, how regions follow, and how many there are. */
  kv: { address: number; layout: KvLayout; regions: number }
  maxSequences: number
  stepTokens: number
  /** What matrices within blocks become where their shapes allow it; bf16 unless given. */
  quantization?: Quantization | undefined
  /** Whether matrix products are measured before they are used. */
  tune?: boolean
  prefetchBytes?: number
  /** Rounds of loads before its last that gemv.cu lets the next kernel start at. */
  releaseRounds?: number
  /** Off only to measure what it brings. */
  overlap?: boolean
  /** Off only where there is no gemv.cu: few tokens are multiplied by the matrix library, too. */
  skinny?: boolean
  /** Off only to measure or test what comes instead: a kernel a product. */
  wholeSteps?: boolean
  /** Has 5–128 tokens done by our own kernels wherever they fit, faster or not; for tests. */
  hopperAlways?: boolean
  /** Attention, if it is not the kernels made for speed. */
  attention?: (state: StepState, find: KernelFinder) => Attention
  /** The matrix library, if it is not the machine's. */
  lt?: CublasLt
  /** Takes note of how long each part of the start takes. */
  times?: StartTimes
  /** Is told of what takes long, before it begins. */
  say?: (what: string) => void
}

/**
 * What gemv.cu brings into L2 ahead of its turn, and how many rounds of loads before its last the
 * next kernel may start: as measured on an H100 for an 8B model's single sequence. Prefetching
 * 4–32 MiB costs 2–4 % (half of L2 is copies of the other half, and what is early is evicted);
 * starting early costs 9 %, because blocks then crowd on the multiprocessors that end first.
 */
const PREFETCH_BYTES = 0
export const RELEASE_ROUNDS = 0

/** Compute capability 9.0, with products of warpgroups; launches may overlap from here on. */
export const HOPPER = 90

export class CudaForward {
  readonly vocab: number
  readonly state: StepState
  readonly sampling: SamplingTable
  readonly logprobs: LogprobRing
  readonly weights: DeviceWeights
  readonly stream: number
  /** [outputs, vocab] float32 of the last step. */
  readonly logits: number
  readonly matmuls: Matmuls
  private readonly options: ForwardOptions
  /** Whether kernels may start while the one before them ends. */
  private readonly overlap: boolean
  private readonly kernels: Kernels
  private readonly attention: Attention
  private readonly choices: Choices
  private readonly e4m3: E4m3 | undefined
  private readonly arena: number
  private readonly adjusted: number
  private readonly ropes = new Map<RopeConfig, { address: number; magnitude: number }>()
  readonly decoding: Lowering
  readonly mixed: Lowering
  private readonly graphs = new Map<number, number>()
  private readonly fetchLaunch: KernelLaunch
  private readonly sampleLaunch: SampleLaunch
  private readonly publishLaunch: KernelLaunch

  /** @throws LatticeError `backend_unavailable`, `kernel_compile_failed`, `gpu_call_failed` */
  constructor(model: Model, options: ForwardOptions) {
    this.options = options
    const { device, modules, kv, maxSequences, stepTokens } = options
    const { driver, info } = device
    const { config } = model
    this.overlap = (options.overlap ?? true) && info.capability >= HOPPER
    this.vocab = config.vocab
    this.stream = driver.createStream()
    this.kernels = new Kernels(device, modules)
    const limits = { tokens: stepTokens, outputs: maxSequences, slots: maxSequences }
    this.state = new StepState(driver, limits, this.stream)
    this.logprobs = new LogprobRing(driver, maxSequences)
    const program = programFor(model)
    const nodes = { decoding: fuse(program, true), mixed: fuse(program, false) }
    const fill = (address: number, elements: number, seed: number, scale: number) =>
      this.fillRandom(address, elements, seed, scale)
    const rowsMax = paddedRows(Math.max(maxSequences, stepTokens))
    const { find } = this.kernels
    this.e4m3 = options.quantization && new E4m3(device, find, model, rowsMax, this.stream)
    this.weights = new DeviceWeights(driver, model, nodes.decoding, fill, this.stream, this.e4m3)
    options.times?.done('weights')
    this.matmuls = new Matmuls(driver, options.lt ?? loadCublasLt(), info, modules.folder)
    this.choices = new Choices(choicesPath(modules.folder, 'skinny', info, driver.version))
    this.attention =
      options.attention?.(this.state, this.kernels.find) ?? this.makeAttention(program)
    this.sampling = new SamplingTable(
      driver,
      this.kernels.find,
      maxSequences,
      this.vocab,
      this.stream,
    )
    const outputs = paddedRows(maxSequences)
    this.logits = driver.allocate(2 * outputs * this.vocab * 4)
    this.adjusted = this.logits + outputs * this.vocab * 4
    const context: LowerContext = {
      driver,
      find: this.kernels.find,
      matmuls: this.matmuls,
      weights: this.weights,
      e4m3: this.e4m3,
      attention: this.attention,
      state: this.state,
      layout: kv.layout,
      kv,
      multiprocessors: info.multiprocessors,
      sharedBytes: info.sharedBytesPerBlock,
      // Attention is a part of it.
      wholeSteps: options.wholeSteps ?? options.attention === undefined,
      logits: this.logits,
      ropeTable: (rope) => this.ropeTable(rope),
      prefetchBytes: options.prefetchBytes ?? PREFETCH_BYTES,
      releaseRounds: options.releaseRounds ?? RELEASE_ROUNDS,
      overlap: this.overlap,
      skinny: options.skinny ?? true,
      hopperRoom: info.capability === HOPPER ? info.sharedBytesPerBlock : 0,
      hopper: this.hopper,
      choices: this.choices,
    }
    const rows = { tokens: stepTokens, outputs: maxSequences }
    const decodingRows = { tokens: maxSequences, outputs: maxSequences }
    this.decoding = new Lowering(program, nodes.decoding, context, decodingRows)
    this.mixed = new Lowering(program, nodes.mixed, context, rows)
    // Steps follow each other on one stream: both kinds may use the same memory.
    this.arena = driver.allocate(Math.max(this.decoding.buffers.bytes, this.mixed.buffers.bytes))
    this.decoding.build(this.arena)
    this.mixed.build(this.arena)
    this.fetchLaunch = this.makeFetch()
    this.sampleLaunch = this.makeSample()
    this.publishLaunch = this.makePublish()
    for (const launch of [this.fetchLaunch, this.sampleLaunch.launch, this.publishLaunch]) {
      if (this.overlap) launch.programmatic()
    }
    this.decoding.prepare()
    this.mixed.prepare()
    options.times?.done('loading kernels')
    if (options.tune ?? true) this.tune()
  }

  /** The bucket that a number of decoding sequences falls into. */
  bucketOf(rows: number): number {
    return bucketOf(rows, this.rowsMax)
  }

  /**
   * Queues a decode step whose first `bucketOf(rows)` rows were set, those beyond `rows` as
   * padding (slot -1), each with its own number as output.
   * @returns the step's number, for `state.wait` and `state.tokensOf`
   */
  decode(rows: number): number {
    const bucket = this.bucketOf(rows)
    const graph = this.graphs.get(bucket) ?? this.capture(bucket)
    this.options.device.driver.launchGraph(graph, this.stream)
    this.state.begin()
    return this.state.steps - 1
  }

  /**
   * Queues a step of any tokens. Without `sample` its logits are computed and nothing drawn.
   * @returns the step's number
   */
  step(shape: Omit<StepShape, 'stream'>, sample: boolean): number {
    this.queue(this.mixed, { ...shape, stream: this.stream }, sample)
    this.state.begin()
    return this.state.steps - 1
  }

  close(): void {
    const { driver } = this.options.device
    driver.synchronize()
    for (const graph of this.graphs.values()) driver.destroyExecutable(graph)
    for (const { address } of this.ropes.values()) driver.free(address)
    this.decoding.close()
    this.mixed.close()
    driver.free(this.arena)
    driver.free(this.logits)
    this.attention.close()
    this.sampling.close()
    this.logprobs.close()
    this.matmuls.close()
    this.weights.close()
    this.e4m3?.close()
    this.state.close()
    this.kernels.close()
    driver.destroyStream(this.stream)
  }

  private get rowsMax(): number {
    return this.options.maxSequences
  }

  private get hopper(): HopperUse {
    if (this.options.hopperAlways) return 'always'
    if (this.e4m3) return 'never'
    return (this.options.skinny ?? true) ? 'measured' : 'never'
  }

  private capture(bucket: number): number {
    const { driver } = this.options.device
    const { stream } = this
    const shape = { stream, tokens: bucket, outputs: bucket, singles: bucket, segments: 0 }
    driver.beginCapture(stream)
    this.queue(this.decoding, shape, true)
    const graph = driver.endCapture(stream)
    const executable = driver.instantiate(graph)
    driver.destroyGraph(graph)
    this.graphs.set(bucket, executable)
    return executable
  }

  private queue(lowering: Lowering, shape: StepShape, sample: boolean): void {
    const { driver } = this.options.device
    const { stream, tokens, outputs, segments } = shape
    const fetched = Math.max(tokens, segments)
    this.fetchLaunch
      .set(8, tokens)
      .set(9, segments)
      .grid(Math.ceil(fetched / 256))
    driver.launch(this.fetchLaunch, stream)
    lowering.queue(shape)
    if (sample && outputs > 0) driver.launch(this.sampleLaunch.of(outputs), stream)
    driver.launch(this.publishLaunch.set(1, outputs), stream)
  }

  private makeAttention(program: Program): CudaAttention {
    const { device, modules, kv, maxSequences } = this.options
    const { heads, kvHeads, headDim, attentionScale } = program.config
    const { layout } = kv
    return new CudaAttention({
      device,
      modules,
      shape: { heads, kvHeads, headDim, scale: attentionScale },
      kv: {
        base: kv.address,
        slotStride: layout.slotBytes,
        tokenStride: layout.tokenStride,
        slots: kv.regions,
        slotTokens: Math.floor(layout.slotBytes / layout.tokenStride),
      },
      rowsMax: maxSequences,
    })
  }

  private makeFetch(): KernelLaunch {
    const { state, options } = this
    const kinds: ArgumentKind[] = [
      ...(['u64', 'i32', 'i32', 'i32', 'u64', 'u64', 'u64', 'u64', 'i32', 'i32'] as const),
      ...Array.from({ length: 15 }, () => 'u64' as const),
    ]
    const { tokens: t, outputs: o } = state.rows
    const { segments: s } = state
    const launch = new KernelLaunch(this.kernels.find('step.cu', 'fetchStep'), kinds)
    return launch
      .setAll(
        ...[state.inputRing, PLACES, state.entriesOfPlace, state.limits.tokens, state.counter],
        ...[state.lastTokens, options.kv.address, options.kv.layout.slotBytes, 0, 0],
        ...[state.tokens, t.positions, t.bases, t.regions, t.lengths],
        ...[o.positions, o.bases, o.regions, o.lengths, state.outputRows, state.outputSlots],
        ...[s.firstRows, s.starts, s.counts, s.regions],
      )
      .threads(256)
  }

  private makeSample(): SampleLaunch {
    const { state, sampling, options } = this
    const { driver, info } = options.device
    return new SampleLaunch(driver, this.kernels.find, info, [
      ...[this.logits, this.vocab, state.outputSlots, sampling.table, sampling.biasTokens],
      ...[sampling.biases, sampling.counts, this.adjusted, state.sampled, state.lastTokens],
      ...[this.logprobs.address, PLACES, state.limits.outputs, state.counter],
    ])
  }

  private makePublish(): KernelLaunch {
    const { state } = this
    const kinds: ArgumentKind[] = ['u64', 'i32', 'u64', 'i32', 'i32', 'u64', 'u64']
    const launch = new KernelLaunch(this.kernels.find('step.cu', 'publishStep'), kinds)
    return launch
      .setAll(
        ...[state.sampled, 0, state.outputRing, PLACES, state.limits.outputs],
        ...[state.counter, state.done],
      )
      .threads(256)
  }

  private ropeTable(rope: RopeConfig): { address: number; magnitude: number } {
    const known = this.ropes.get(rope)
    if (known) return known
    const { driver } = this.options.device
    const { frequencies, magnitude } = ropeTable(rope)
    const address = driver.allocate(frequencies.byteLength)
    const staging = driver.allocateHost(frequencies.byteLength)
    new Float32Array(viewMemory(staging, frequencies.byteLength)).set(frequencies)
    driver.copyToDevice(address, staging, frequencies.byteLength, this.stream)
    driver.synchronizeStream(this.stream)
    driver.freeHost(staging)
    const table = { address, magnitude }
    this.ropes.set(rope, table)
    return table
  }

  /** Queues the filling of memory with numbers in ±scale; see step.cu. */
  fillRandom(address: number, elements: number, seed: number, scale: number): void {
    const kinds: ArgumentKind[] = ['u64', 'u64', 'u32', 'f32']
    const launch = new KernelLaunch(this.kernels.find('step.cu', 'fillRandom'), kinds)
    launch.setAll(address, elements, seed, scale).grid(2048).threads(256)
    this.options.device.driver.launch(launch, this.stream)
  }

  /** Measures products, and captures all graphs: no request is to wait for what can be done now. */
  private tune(): void {
    const { device, times, say, stepTokens } = this.options
    const { stream, decoding, mixed, matmuls, e4m3, arena, rowsMax } = this
    const choices = this.hopper === 'measured' ? this.choices : undefined
    const fillRandom = (address: number, elements: number) =>
      this.fillRandom(address, elements, 1, 1)
    const measured = tuneProducts({
      ...{ driver: device.driver, stream, decoding, mixed, matmuls, choices, e4m3, arena },
      ...{ rowsMax, stepTokens, fillRandom, say },
    })
    times?.done('matrix products', measured > 0 ? `${measured} measured` : undefined)
    const buckets = [...bucketsUpTo(rowsMax), rowsMax].map((rows) => Math.min(rows, rowsMax))
    for (const bucket of new Set(buckets)) this.capture(bucket)
    times?.done('graphs')
  }
}
