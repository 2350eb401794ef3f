// Owns the CPU backend: weights, KV memory, thread pool and the graphs that steps run on.

import { present } from '../../assert.ts'
import { LatticeError } from '../../errors.ts'
import { type GgmlBase, type GgmlCpu, loadBase, loadVariant } from '../../ffi/ggml.ts'
import type { KvLayout } from '../../kv/layout.ts'
import { regionsFor } from '../../kv/regions.ts'
import type { StoreOptions } from '../../tier/store/open.ts'
import type { OffloadOptions } from '../../tier/tier.ts'
import { programFor } from '../../model/arch/programs.ts'
import type { Model } from '../../model/model.ts'
import type { Program } from '../../model/program.ts'
import type { Backend, StepBatch } from '../backend.ts'
import { Activations } from './activations.ts'
import { AttentionPlans } from './attention.ts'
import { StepGraph } from './graph.ts'
import { HostKvMemory, hostKvLayout } from './kv-memory.ts'
import { kvNamespace } from './kv-namespace.ts'
import { StepMemory } from './step-memory.ts'
import { createThreadPool, type ThreadPool } from './threads.ts'
import { bestVariant } from './variant.ts'
import { WeightTensors } from './weight-tensors.ts'
import { Weights } from './weights.ts'

export interface CpuBackendOptions {
  contextLength: number
  maxSequences: number
  stepTokens: number
  /** Cores to compute on, one thread each. */
  cpus: readonly number[]
  pin?: boolean
  /** Order of KV in a slot; see docs/decisions/0001-kv-layout-on-the-host.md. */
  kvOrder?: 'layer-major' | 'token-major'
  /** Where KV goes when memory is short. */
  offload?: CpuOffload
  /** A build's name instead of the best one, for tests. */
  variant?: string
}

/** The backend knows under which name its KV is kept. */
export type CpuOffload = Omit<OffloadOptions, 'store'> & { store?: Omit<StoreOptions, 'namespace'> }

/** Graphs are built for up to 1, 4, 16 … attention pieces, each at its first use. */
const PIECES_GROWTH = 4

/** From this many queries on, ggml's attention is tiled and sums in float32 (GGML_FA_TILE_Q). */
export const CHUNK_TOKENS_MIN = 64

export class CpuBackend implements Backend {
  readonly vocab: number
  readonly stepTokensMax: number
  readonly chunkTokensMin = CHUNK_TOKENS_MIN
  readonly kv: HostKvMemory
  readonly variant: string
  readonly weights: Weights
  private readonly g: GgmlBase
  private readonly cpu: GgmlCpu
  private readonly handle: number
  private readonly pool: ThreadPool
  private readonly program: Program
  private readonly tensors: WeightTensors
  private readonly activations: Activations
  private readonly options: CpuBackendOptions
  private readonly graphs: StepGraph[] = []
  private readonly memory: StepMemory
  private readonly plans: AttentionPlans

  constructor(model: Model, options: CpuBackendOptions) {
    const { config } = model
    this.options = options
    this.vocab = config.vocab
    this.stepTokensMax = options.stepTokens
    this.variant = options.variant ?? bestVariant()
    this.g = loadBase()
    this.cpu = loadVariant(this.variant)
    this.program = programFor(model)
    this.weights = new Weights(model, this.cpu)
    this.tensors = new WeightTensors(this.program, this.weights, model.normWeightOffset)
    this.activations = new Activations(
      this.program,
      options.stepTokens,
      (op) => this.tensors.joined(op) !== undefined,
    )
    const layout = hostKvLayout(config, options.contextLength, options.kvOrder)
    const { stepTokens, maxSequences, contextLength } = options
    const offload = options.offload && this.named(options.offload, model, layout)
    this.kv = new HostKvMemory(layout, maxSequences, regionsFor(maxSequences), offload)
    this.memory = new StepMemory({
      activationBytes: this.activations.bytes,
      stepTokens,
      maxSequences,
      contextLength,
      vocab: config.vocab,
    })
    const window = config.slidingWindow?.tokens
    const lastIsLocal = config.slidingWindow?.layers.at(-1) ?? false
    this.plans = new AttentionPlans(
      window,
      lastIsLocal ? present(window, 'a window') : Infinity,
      this.memory.maskViews,
    )

    this.pool = createThreadPool(this.cpu, options.cpus, options.pin ?? true)
    this.handle = this.cpu.ggml_backend_cpu_init()
    this.cpu.ggml_backend_cpu_set_n_threads(this.handle, this.pool.threads)
    this.cpu.ggml_backend_cpu_set_threadpool(this.handle, this.pool.handle)
  }

  launch(batch: StepBatch): void {
    this.memory.fill(batch, this.kv.layout)
    const { outputBatch } = this.memory
    this.plans.plan(batch, outputBatch)
    const graph = this.graphFor(this.plans.pieces())
    graph.bind(batch.tokenCount, outputBatch.segments, this.plans)
    const status = this.g.ggml_backend_graph_compute(this.handle, graph.graph)
    if (status !== 0) {
      throw new LatticeError('backend_failed', `The CPU library failed with status ${status}.`)
    }
  }

  collect(): readonly Float32Array[] {
    return this.memory.logitsRows
  }

  close(): void {
    for (const graph of this.graphs) graph?.free()
    this.g.ggml_backend_free(this.handle)
    this.pool.free()
    this.kv.close()
    this.weights.free()
    this.memory.free()
  }

  private named({ store, ...rest }: CpuOffload, model: Model, layout: KvLayout): OffloadOptions {
    if (!store) return rest
    const kernels = `${this.variant} ${this.g.ggml_version()}`
    return { ...rest, store: { ...store, namespace: kvNamespace(model, kernels, layout) } }
  }

  private graphFor(pieces: number): StepGraph {
    let capacity = 1
    let i = 0
    while (capacity < pieces) {
      capacity *= PIECES_GROWTH
      i++
    }
    return (this.graphs[i] ??= new StepGraph(
      this.program,
      this.tensors,
      this.activations,
      this.memory,
      this.kv,
      { tokens: this.stepTokensMax, outputs: this.options.maxSequences, pieces: capacity },
    ))
  }
}
