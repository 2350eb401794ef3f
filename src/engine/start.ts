// Owns starting an engine from a model file: what the flags leave open is decided here from the
// machine, and every decision is a line that the user sees.

import { LatticeError } from '../errors.ts'
import { allowedCpus } from '../ffi/libc.ts'
import { MAX_QUEUE_DEFAULT, MAX_SEQUENCES_DEFAULT, STEP_TOKENS_MAX_DEFAULT } from '../limits.ts'
import { openModel } from '../model/load.ts'
import { computeCpus } from '../os/cpus.ts'
import { type MemoryBudget, memoryBudget } from '../os/memory.ts'
import type { Engine } from './api.ts'
import { EngineClient } from './client.ts'

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

/**
 * @throws LatticeError from opening the model, `backend_unavailable`, or `usage` for options that
 *   contradict the model or the machine.
 */
export async function startEngine(path: string, options: EngineOptions): Promise<StartedEngine> {
  const { config } = openModel(path)
  const contextLength = options.contextLength ?? config.contextLength
  if (contextLength > config.contextLength) {
    throw new LatticeError(
      'usage',
      `A context of ${contextLength} was asked for; the model was trained for` +
        ` ${config.contextLength}.`,
      { todo: `Give --context ${config.contextLength} or less.` },
    )
  }
  const cpus = computeCpus(allowedCpus(), options.threads)
  const budget = memoryBudget()
  const kvBytes = options.kvMemoryBytes ?? Math.floor(budget.availableBytes * KV_SHARE)
  const maxSequences = options.maxSequences ?? MAX_SEQUENCES_DEFAULT
  const engine = await EngineClient.start(
    {
      modelPath: path,
      contextLength,
      maxSequences,
      // Every running sequence must be able to decode in one step.
      stepTokens: Math.max(options.stepTokens ?? STEP_TOKENS_MAX_DEFAULT, maxSequences),
      kvBytes,
      cpus,
    },
    {
      id: options.modelId,
      architecture: config.architecture,
      contextLength,
      vocabSize: config.vocab,
    },
    { sequences: maxSequences + (options.maxQueue ?? MAX_QUEUE_DEFAULT), contextLength },
  )
  const { variant, repackedBytes, layout } = engine.facts
  const repacked = Object.entries(repackedBytes).map(
    ([name, bytes]) => `${mib(bytes)} of weights repacked for ${name}`,
  )
  const tokenBytes = layout.shape.layers * layout.shape.rowBytes
  const report = [
    `model    ${config.name} (${config.architecture}), context ${contextLength} tokens`,
    `device   ${options.device === 'auto' ? 'cpu, the only one in this build' : 'cpu'}:` +
      ` ${variant} kernels on cores ${cpus.join(',')}` +
      (repacked.length > 0 ? `; ${repacked.join(', ')}` : ''),
    `memory   KV up to ${mib(kvBytes)} (${whence(options, budget)}),` +
      ` ${Math.floor(kvBytes / tokenBytes)} tokens at ${(tokenBytes / 1024).toFixed(1)} KiB each`,
    `limits   ${maxSequences} sequences at once, ${options.maxQueue ?? MAX_QUEUE_DEFAULT} waiting`,
  ]
  return { engine, report }
}

function whence(options: EngineOptions, budget: MemoryBudget): string {
  if (options.kvMemoryBytes !== undefined) return 'as asked'
  const cgroup = budget.cgroupBytes === undefined ? '' : `, cgroup limit ${mib(budget.cgroupBytes)}`
  return (
    `${KV_SHARE * 100} % of ${mib(budget.availableBytes)} available;` +
    ` machine ${mib(budget.machineBytes)}${cgroup}`
  )
}

function mib(bytes: number): string {
  return bytes >= 1 << 30
    ? `${(bytes / 2 ** 30).toFixed(1)} GiB`
    : `${(bytes / 2 ** 20).toFixed(1)} MiB`
}
