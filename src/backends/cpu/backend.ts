// Owns the CPU backend: weights, KV memory, thread pool and the graphs that steps run on.

import { present } from '../../assert.ts'
import { LatticeError } from '../../errors.ts'
import { type GgmlBase, type GgmlCpu, loadBase, loadVariant } from '../../ffi/ggml.ts'
import { mapAnonymous, unmap, viewMemory } from '../../ffi/libc.ts'
import { programFor } from '../../model/arch/programs.ts'
import type { Model } from '../../model/model.ts'
import type { Program } from '../../model/program.ts'
import type { Backend, StepBatch } from '../backend.ts'
import { Activations } from './activations.ts'
import { AttentionPlan } from './attention.ts'
import { type StepMemory, StepGraph } from './graph.ts'
import { HostKvMemory, hostKvLayout } from './kv-memory.ts'
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
  /** A build's name instead of the best one, for tests. */
  variant?: string
}

/** Graphs are built for up to 1, 4, 16 … attention pieces, each at its first use. */
const PIECES_GROWTH = 4

/** From this many queries on, ggml's attention is tiled and sums in float32 (GGML_FA_TILE_Q). */
export const CHUNK_TOKENS_MIN = 64

/** Outputs start on cache lines. */
const ALIGNMENT = 64

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
  private readonly block: { address: number; bytes: number }
  private readonly tokens: Int32Array
  private readonly positions: Int32Array
  /** Low and high words of 64-bit rows. */
  private readonly kvRows: Int32Array
  private readonly outputs: Int32Array
  private readonly logits: Float32Array[]
  private readonly global: AttentionPlan
  private readonly window: AttentionPlan
  private outputCount = 0

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
    this.kv = new HostKvMemory(layout, options.maxSequences)

    const { stepTokens, maxSequences, contextLength } = options
    // Rows for every token of a step; lengths are rounded up by less than 256.
    const maskElements = (stepTokens + maxSequences) * (contextLength + 256)
    const sizes = {
      activations: this.activations.bytes,
      tokens: stepTokens * 4,
      positions: stepTokens * 4,
      kvRows: stepTokens * 8,
      outputs: maxSequences * 4,
      logits: maxSequences * config.vocab * 4,
      maskGlobal: maskElements * 2,
      maskWindow: maskElements * 2,
    }
    const offsets = new Map<string, number>()
    let bytes = 0
    for (const [name, size] of Object.entries(sizes)) {
      offsets.set(name, bytes)
      bytes += Math.ceil(size / ALIGNMENT) * ALIGNMENT
    }
    this.block = { address: mapAnonymous(bytes), bytes }
    const at = (name: keyof typeof sizes): number =>
      this.block.address + present(offsets.get(name), name)
    const view = (name: keyof typeof sizes): ArrayBuffer => viewMemory(at(name), sizes[name])
    this.memory = {
      activations: at('activations'),
      tokens: at('tokens'),
      positions: at('positions'),
      kvRows: at('kvRows'),
      outputs: at('outputs'),
      logits: at('logits'),
      masks: { global: at('maskGlobal'), window: at('maskWindow') },
    }
    this.tokens = new Int32Array(view('tokens'))
    this.positions = new Int32Array(view('positions'))
    this.kvRows = new Int32Array(view('kvRows'))
    this.outputs = new Int32Array(view('outputs'))
    const logits = view('logits')
    this.logits = Array.from(
      { length: maxSequences },
      (_, i) => new Float32Array(logits, i * config.vocab * 4, config.vocab),
    )
    this.global = new AttentionPlan(Infinity, new Uint16Array(view('maskGlobal')))
    const span = config.slidingWindow?.tokens ?? Infinity
    this.window = new AttentionPlan(span, new Uint16Array(view('maskWindow')))

    this.pool = createThreadPool(this.cpu, options.cpus, options.pin ?? true)
    this.handle = this.cpu.ggml_backend_cpu_init()
    this.cpu.ggml_backend_cpu_set_n_threads(this.handle, this.pool.threads)
    this.cpu.ggml_backend_cpu_set_threadpool(this.handle, this.pool.handle)
  }

  launch(batch: StepBatch): void {
    this.fillInputs(batch)
    this.global.plan(batch)
    if (this.program.config.slidingWindow) this.window.plan(batch)
    const graph = this.graphFor(Math.max(this.global.count, this.window.count))
    graph.bind(batch.tokenCount, this.outputCount, this.global, this.window)
    const status = this.g.ggml_backend_graph_compute(this.handle, graph.graph)
    if (status !== 0) {
      throw new LatticeError('backend_failed', `The CPU library failed with status ${status}.`)
    }
  }

  collect(): readonly Float32Array[] {
    return this.logits
  }

  close(): void {
    for (const graph of this.graphs) graph?.free()
    this.g.ggml_backend_free(this.handle)
    this.pool.free()
    this.kv.close()
    this.weights.free()
    unmap(this.block.address, this.block.bytes)
  }

  private fillInputs(batch: StepBatch): void {
    const { layout } = this.kv
    const slotRows = layout.slotBytes / layout.tokenStride
    this.tokens.set(batch.tokens.subarray(0, batch.tokenCount))
    this.outputCount = 0
    let token = 0
    for (let s = 0; s < batch.segments; s++) {
      const start = batch.starts[s] ?? 0
      const row = (batch.slots[s] ?? 0) * slotRows + start
      const count = batch.counts[s] ?? 0
      for (let i = 0; i < count; i++, token++) {
        this.positions[token] = start + i
        this.kvRows[token * 2] = (row + i) % 2 ** 32
        this.kvRows[token * 2 + 1] = Math.floor((row + i) / 2 ** 32)
      }
      if (batch.wantsLogits[s]) this.outputs[this.outputCount++] = token - 1
    }
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
