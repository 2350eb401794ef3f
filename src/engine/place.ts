// Owns where a model computes: on the CPU or a GPU, with which memory for KV, and how that is said.

import { CHUNK_TOKENS_MIN } from '../backends/cpu/backend.ts'
import { hostKvLayout } from '../backends/cpu/kv-memory.ts'
import type { DeviceReport } from '../backends/cuda/describe.ts'
import type { Quantization } from '../backends/cuda/quantization.ts'
import { LatticeError } from '../errors.ts'
import { allowedCpus } from '../ffi/libc.ts'
import type { KvLayout } from '../kv/layout.ts'
import { STEP_TOKENS_GPU, STEP_TOKENS_MAX_DEFAULT } from '../limits.ts'
import { isDummy } from '../model/dummy.ts'
import type { Model } from '../model/model.ts'
import { computeCpus } from '../os/cpus.ts'
import { memoryBudget } from '../os/memory.ts'
import { chooseDevice, type DeviceOption } from './device.ts'
import type { BackendChoice, EngineFacts, StorePlace } from './messages.ts'

/** What of an engine's options has to do with where it computes. */
export interface PlaceOptions {
  device: DeviceOption
  /** What matrices become on a GPU, where their shapes allow it; bfloat16 unless given. */
  quantization?: Quantization
  /** Compute threads, each on a core of its own. */
  threads?: number
  /** Hard limit on KV memory. */
  kvMemoryBytes?: number
  /** When idle KV memory of a GPU is given back to the driver. */
  kvIdleReleaseMs?: number
  /** Pinned memory of the host for KV that a GPU has no room for. */
  kvHostBytes?: number
  /** Where prefixes outlive the process; the size of the offload file says how many. */
  kvStore?: StorePlace
  maxSequences?: number
  /** Tokens of one step, at most. */
  stepTokens?: number
}

export interface Place {
  backend: BackendChoice
  /** Where KV lies in slots of so many tokens. */
  layout: (tokens: number) => KvLayout
  kvBytes: number
  /** Why it is as much. */
  whence: string
  chunkTokensMin: number
  stepTokens: number
  /** What is said of it when it has started. */
  describe: (facts: EngineFacts) => string
}

/** Share of the available memory that KV may take: the rest is for weights, heap and page cache. */
const HOST_KV_SHARE = 0.6

/** Of what weights and activations leave free on a GPU; its driver needs some, too. */
const GPU_KV_SHARE = 0.92

/**
 * @throws LatticeError `backend_unavailable` if there is no such device, or `usage` for options
 *   that it does not know
 */
export async function choosePlace(
  path: string,
  model: Model,
  options: PlaceOptions,
): Promise<Place> {
  const { device, reason, gpu } = await chooseDevice(options.device)
  if (device === 'cuda' && gpu) return onGpu(path, model, options, gpu, reason)
  return onCpu(path, model, options, reason)
}

function onCpu(path: string, model: Model, options: PlaceOptions, reason: string): Place {
  if (options.quantization !== undefined) {
    throw new LatticeError('usage', '--quantization is for a GPU; the CPU computes here.', {
      todo: 'Leave it out; the CPU multiplies the weights of a quantized file as they are.',
    })
  }
  if (options.kvIdleReleaseMs !== undefined) {
    throw new LatticeError('usage', '--kv-idle-release is for a GPU; the CPU computes here.', {
      todo: "Leave it out: the kernel has the host's idle KV memory back within 100 ms anyway.",
    })
  }
  if (options.kvHostBytes !== undefined) {
    throw new LatticeError('usage', '--kv-host is for a GPU; the CPU computes here.', {
      todo: 'Leave it out: --kv-memory says how much of the memory KV may take.',
    })
  }
  if (isDummy(model)) {
    throw new LatticeError('usage', `${model.config.name} has no weights; only a GPU makes them.`, {
      todo: 'Use --device cuda, or a model with files.',
    })
  }
  const cpus = computeCpus(allowedCpus(), options.threads)
  const budget = memoryBudget()
  const mostBytes = Math.min(budget.machineBytes, budget.cgroupBytes ?? Infinity)
  assertThere(options.kvMemoryBytes, mostBytes, 'this process may have')
  const cgroup = budget.cgroupBytes === undefined ? '' : `, cgroup limit ${mib(budget.cgroupBytes)}`
  return {
    backend: { kind: 'cpu', modelPath: path, cpus },
    layout: (tokens) => hostKvLayout(model.config, tokens),
    kvBytes: options.kvMemoryBytes ?? Math.floor(budget.availableBytes * HOST_KV_SHARE),
    whence:
      `${HOST_KV_SHARE * 100} % of ${mib(budget.availableBytes)} available;` +
      ` machine ${mib(budget.machineBytes)}${cgroup}`,
    chunkTokensMin: CHUNK_TOKENS_MIN,
    stepTokens: STEP_TOKENS_MAX_DEFAULT,
    describe: ({ variant, repackedBytes }) => {
      const repacked = Object.entries(repackedBytes).map(
        ([name, bytes]) => `; ${mib(bytes)} of weights repacked for ${name}`,
      )
      return `${reason}: ${variant} kernels on cores ${cpus.join(',')}${repacked.join('')}`
    },
  }
}

async function onGpu(
  path: string,
  model: Model,
  options: PlaceOptions,
  gpu: DeviceReport,
  reason: string,
): Promise<Place> {
  if (options.threads !== undefined) {
    throw new LatticeError('usage', '--threads is for a CPU; a GPU computes here.', {
      todo: 'Leave it out, or use --device cpu.',
    })
  }
  if (options.kvStore) {
    throw new LatticeError('usage', 'Prompts outlive the process on a CPU only, not on a GPU.', {
      todo: 'Leave out --kv-store, or use --device cpu.',
    })
  }
  const { kvHostBytes } = options
  const { availableBytes } = memoryBudget()
  if (kvHostBytes !== undefined && kvHostBytes > availableBytes) {
    throw new LatticeError(
      'usage',
      `--kv-host of ${mib(kvHostBytes)} is more than the host has: ${mib(availableBytes)}.`,
      { todo: 'Give --kv-host less: it is pinned, so nobody else can have it.' },
    )
  }
  assertThere(options.kvMemoryBytes, gpu.memoryBytes, `${gpu.name} has`)
  const { gpuKvLayout } = await import('../backends/cuda/kv-layout.ts')
  const { config } = model
  const { quantization } = options
  const { e4m3Weights } = await import('../backends/cuda/e4m3.ts')
  const narrow = quantization ? e4m3Weights(model, gpu) : new Set<string>()
  const weights = weightBytes(model, narrow)
  const free = Math.max(0, gpu.freeBytes - weights - workBytes(model, options))
  const idle = options.kvIdleReleaseMs
  return {
    backend: {
      kind: 'cuda',
      modelPath: path,
      device: gpu.index,
      ...(idle !== undefined && { kvIdleReleaseMs: idle }),
      ...(kvHostBytes !== undefined && { kvHostBytes }),
      ...(quantization && { quantization }),
    },
    layout: (tokens) => gpuKvLayout(config, tokens),
    kvBytes: options.kvMemoryBytes ?? Math.floor(free * GPU_KV_SHARE),
    whence: `${GPU_KV_SHARE * 100} % of the ${mib(free)} that the model leaves free`,
    chunkTokensMin: 1,
    stepTokens: STEP_TOKENS_GPU,
    describe: () =>
      `${reason}: ${gpu.name} (${gpu.architecture}), ${mib(weights)} of weights` +
      (quantization ? narrowed(model, narrow) : ` as bfloat16${converted(model)}`),
  }
}

/** @param narrow matrices of one byte an element, and a scale a row; all else is bfloat16 */
export function weightBytes({ tensors }: Model, narrow: ReadonlySet<string>): number {
  let bytes = 0
  for (const { name, shape } of tensors.values()) {
    const elements = shape.reduce((a, b) => a * b, 1)
    bytes += narrow.has(name) ? elements + 2 * (shape[1] ?? 1) : 2 * elements
  }
  return bytes
}

/** What is fp8, and what is not although it is multiplied in blocks. */
function narrowed({ tensors }: Model, narrow: ReadonlySet<string>): string {
  const matrices = [...tensors.values()].filter(
    ({ name, shape }) => shape.length > 1 && name.startsWith('blk.'),
  )
  const wide = matrices.filter(({ name }) => !narrow.has(name)).length
  const but =
    wide === 0 ? '' : `, ${wide} of ${matrices.length} matrices of blocks not (their sizes)`
  return `: fp8 (e4m3, a scale a row) in blocks${but}; embedding and output as bfloat16`
}

/** @throws LatticeError `usage` for KV memory that could not be had if nobody else had any */
function assertThere(askedBytes: number | undefined, mostBytes: number, whose: string): void {
  if (askedBytes === undefined || askedBytes <= mostBytes) return
  throw new LatticeError(
    'usage',
    `${mib(askedBytes)} of KV memory were asked for; ${whose} ${mib(mostBytes)} in all.`,
    { todo: 'Give --kv-memory less, or leave it out.' },
  )
}

/** What becomes bfloat16, if anything does. */
function converted({ tensors }: Model): string {
  const matrices = [...tensors.values()].filter(({ shape }) => shape.length > 1)
  const types = [...new Set(matrices.map(({ type }) => type))].filter((type) => type !== 'BF16')
  return types.length === 0 ? '' : `, converted from ${types.toSorted().join(', ')}`
}

/** About what activations, logits and the libraries' workspaces take. */
function workBytes({ config }: Model, options: PlaceOptions): number {
  const { hidden, feedForward, vocab } = config
  const tokens = options.stepTokens ?? STEP_TOKENS_GPU
  const rows = Math.max(64, options.maxSequences ?? 64)
  return (1 << 30) + tokens * (8 * hidden + 4 * feedForward) * 2 + rows * vocab * 12
}

export function mib(bytes: number): string {
  return bytes >= 1 << 30
    ? `${(bytes / 2 ** 30).toFixed(1)} GiB`
    : `${(bytes / 2 ** 20).toFixed(1)} MiB`
}
