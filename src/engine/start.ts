// Owns starting an engine from a model file: what the flags leave open is decided here from the
// machine, and every decision is a line that the user sees.

import { hostKvLayout } from '../backends/cpu/kv-memory.ts'
import { LatticeError } from '../errors.ts'
import { allowedCpus } from '../ffi/libc.ts'
import { EVICTION_DEFAULT, type EvictionName } from '../kv/eviction.ts'
import { liveBytes, pagesFor, tokensIn } from '../kv/layout.ts'
import { MAX_QUEUE_DEFAULT, MAX_SEQUENCES_DEFAULT, STEP_TOKENS_MAX_DEFAULT } from '../limits.ts'
import { CHUNK_TOKENS_MIN } from '../backends/cpu/backend.ts'
import { stepTokensNeeded } from '../scheduler/scheduler.ts'
import { openModel } from '../model/load.ts'
import type { ModelConfig } from '../model/model.ts'
import { computeCpus } from '../os/cpus.ts'
import { type MemoryBudget, memoryBudget } from '../os/memory.ts'
import type { Engine } from './api.ts'
import type { StoreFacts, TierFacts } from '../tier/tier.ts'
import { EngineClient } from './client.ts'
import type { Watermarks } from './offload.ts'
import type { OffloadPlace, StorePlace } from './messages.ts'

export interface EngineOptions {
  /** How the API names the model. */
  modelId: string
  device: 'cpu' | 'auto'
  /** Compute threads, each on a core of its own. */
  threads?: number
  /** Longest sequence; the model's own by default. */
  contextLength?: number
  /** Hard limit on KV memory. */
  kvMemoryBytes?: number
  /** How much of it cached prefixes may keep; 0, the default, is no prefix cache. */
  prefixCacheBytes?: number
  prefixEviction?: EvictionName
  /** Answers are cached as prompts are. */
  prefixCacheOutput?: boolean
  /** A file for KV that memory has no room for. */
  kvOffload?: OffloadPlace
  /** When cached prefixes go there. */
  kvWatermarks?: Watermarks
  /** Where prefixes outlive the process; `kvOffload` says how large. */
  kvStore?: StorePlace
  maxSequences?: number
  maxQueue?: number
  /** Tokens of one step, at most. */
  stepTokens?: number
}

export interface StartedEngine {
  engine: Engine
  /** What was decided and why, a line each. */
  report: string[]
}

/** Share of the available memory that KV may take: the rest is for weights, heap and page cache. */
const KV_SHARE = 0.6

/** A sequence has a prompt and an output token at least. */
const CONTEXT_MIN = 2

/**
 * @throws LatticeError from opening the model, `backend_unavailable`, or `usage` for options that
 *   contradict the model or the machine.
 */
export async function startEngine(path: string, options: EngineOptions): Promise<StartedEngine> {
  const { config } = openModel(path)
  const cpus = computeCpus(allowedCpus(), options.threads)
  const budget = memoryBudget()
  const kvBytes = options.kvMemoryBytes ?? Math.floor(budget.availableBytes * KV_SHARE)
  const prefixCacheBytes = options.prefixCacheBytes ?? 0
  if (prefixCacheBytes > kvBytes) {
    throw new LatticeError(
      'usage',
      `A prefix cache of ${mib(prefixCacheBytes)} is more than the KV memory's ${mib(kvBytes)}.`,
      { todo: 'Give --prefix-cache as much as --kv-memory or less.' },
    )
  }
  if (options.kvWatermarks && !options.kvOffload) {
    throw new LatticeError('usage', '--kv-watermark says when KV goes to a file; there is none.', {
      todo: 'Give --kv-offload SIZE too.',
    })
  }
  const contextLength = chooseContext(config, kvBytes, options.contextLength)
  const maxSequences = options.maxSequences ?? MAX_SEQUENCES_DEFAULT
  const maxQueue = options.maxQueue ?? MAX_QUEUE_DEFAULT
  const stepTokensMin = stepTokensNeeded(maxSequences, CHUNK_TOKENS_MIN)
  const stepTokens = options.stepTokens ?? Math.max(STEP_TOKENS_MAX_DEFAULT, stepTokensMin)
  if (stepTokens < stepTokensMin) {
    throw new LatticeError(
      'usage',
      `A step of ${stepTokens} tokens is too small for ${maxSequences} sequences and a prompt.`,
      { todo: `Give --step-tokens ${stepTokensMin} or more, or fewer --max-sequences.` },
    )
  }
  const engine = await EngineClient.start(
    {
      backend: { kind: 'cpu', modelPath: path, cpus },
      contextLength,
      maxSequences,
      stepTokens,
      kvBytes,
      prefixCacheBytes,
      prefixEviction: options.prefixEviction ?? EVICTION_DEFAULT,
      prefixCacheOutput: options.prefixCacheOutput ?? false,
      ...(options.kvWatermarks && { kvWatermarks: options.kvWatermarks }),
      ...offloadPlace(options),
    },
    {
      id: options.modelId,
      architecture: config.architecture,
      contextLength,
      vocabSize: config.vocab,
    },
    { sequences: maxSequences + maxQueue, contextLength },
  )
  const { variant, repackedBytes, layout, tier } = engine.facts
  const repacked = Object.entries(repackedBytes).map(
    ([name, bytes]) => `${mib(bytes)} of weights repacked for ${name}`,
  )
  const tokenBytes = liveBytes(layout, 1)
  const shortened =
    contextLength < config.contextLength && options.contextLength === undefined
      ? `, what the KV memory holds of the model's ${config.contextLength}`
      : ''
  const answers = options.prefixCacheOutput ? ' and answers' : ''
  const report = [
    `model    ${config.name} (${config.architecture}), context ${contextLength} tokens${shortened}`,
    `device   ${options.device === 'auto' ? 'cpu, the only one in this build' : 'cpu'}:` +
      ` ${variant} kernels on cores ${cpus.join(',')}` +
      (repacked.length > 0 ? `; ${repacked.join(', ')}` : ''),
    `memory   KV up to ${mib(kvBytes)} (${whence(options, budget)}),` +
      ` ${Math.floor(kvBytes / tokenBytes)} tokens at ${(tokenBytes / 1024).toFixed(1)} KiB each` +
      (prefixCacheBytes > 0
        ? `, ${mib(prefixCacheBytes)} of it for cached prefixes${answers}`
        : ''),
    ...(tier ? [`tier     ${describeTier(tier)}`] : []),
    ...(tier?.store ? [`store    ${describeStore(tier.store)}`] : []),
    `limits   ${maxSequences} sequences at once, ${maxQueue} waiting, ${stepTokens} tokens a step`,
  ]
  return { engine, report }
}

/**
 * The longest sequence: as asked, else the model's own, or what the KV memory holds of it.
 * @throws LatticeError `usage` if what was asked for does not fit the model or the memory
 */
function chooseContext(config: ModelConfig, kvBytes: number, asked: number | undefined): number {
  if (asked !== undefined && asked > config.contextLength) {
    throw new LatticeError(
      'usage',
      `A context of ${asked} was asked for; the model was trained for ${config.contextLength}.`,
      { todo: `Give --context ${config.contextLength} or less.` },
    )
  }
  const layout = hostKvLayout(config, config.contextLength)
  const fitting = tokensIn(layout, Math.floor(kvBytes / layout.shape.pageBytes))
  if (asked !== undefined && asked > fitting) {
    throw new LatticeError(
      'usage',
      `A context of ${asked} was asked for; ${mib(kvBytes)} of KV memory hold ${fitting} tokens.`,
      { todo: `Give --context ${fitting} or less, or more --kv-memory.` },
    )
  }
  if (fitting < CONTEXT_MIN) {
    const leastBytes = pagesFor(layout, CONTEXT_MIN) * layout.shape.pageBytes
    throw new LatticeError(
      'usage',
      `${mib(kvBytes)} of KV memory hold ${fitting} tokens, too few for any sequence.`,
      { todo: `Give --kv-memory at least ${leastBytes}.` },
    )
  }
  return asked ?? Math.min(config.contextLength, fitting)
}

function whence(options: EngineOptions, budget: MemoryBudget): string {
  if (options.kvMemoryBytes !== undefined) return 'as asked'
  const cgroup = budget.cgroupBytes === undefined ? '' : `, cgroup limit ${mib(budget.cgroupBytes)}`
  return (
    `${KV_SHARE * 100} % of ${mib(budget.availableBytes)} available;` +
    ` machine ${mib(budget.machineBytes)}${cgroup}`
  )
}

/** @throws LatticeError `usage` for a store without a size, or with two directories */
function offloadPlace({ kvOffload, kvStore }: EngineOptions): { kvOffload?: OffloadPlace } {
  if (!kvStore) return kvOffload ? { kvOffload } : {}
  if (kvOffload && kvOffload.path === undefined)
    return { kvOffload: { ...kvOffload, store: kvStore } }
  throw new LatticeError('usage', 'A KV store has a size, and one directory.', {
    todo: 'Give --kv-offload SIZE, without a directory, together with --kv-store DIR.',
  })
}

function describeStore({ directory, prefixes, tokens, lost }: StoreFacts): string {
  const gone = lost === 0 ? 'nothing lost' : `${lost} torn or changed records or prefixes lost`
  return `${prefixes} prefixes of ${tokens} tokens kept in ${directory}, ${gone}`
}

function describeTier({ bytes, file, touches }: TierFacts): string {
  const { path, direct, tmpfs } = file
  const cache = direct ? 'past the page cache' : 'through the page cache: its disk knows no other'
  const memory = tmpfs ? ' (which is memory itself: a tmpfs)' : ''
  const waits = {
    all: 'a touch of what is absent waits for it',
    user: 'a touch of what is absent waits for it (user code only: no right to more)',
    none: 'no right to userfaultfd, so a reload is waited for as a whole',
  }
  const where = `${mib(bytes)} encrypted in ${path}${memory}, ${cache}`
  return `KV beyond that on disk, ${where}; ${waits[touches]}`
}

function mib(bytes: number): string {
  return bytes >= 1 << 30
    ? `${(bytes / 2 ** 30).toFixed(1)} GiB`
    : `${(bytes / 2 ** 20).toFixed(1)} MiB`
}
