// Owns starting an engine from a model file: what the flags leave open is decided here from the
// machine, and every decision is a line that the user sees.

import { LatticeError } from '../errors.ts'
import { EVICTION_DEFAULT, type EvictionName } from '../kv/eviction.ts'
import { type KvLayout, liveBytes, pagesFor, tokensIn } from '../kv/layout.ts'
import { MAX_QUEUE_DEFAULT, MAX_SEQUENCES_DEFAULT } from '../limits.ts'
import { stepTokensNeeded } from '../scheduler/scheduler.ts'
import { openModel } from '../model/load.ts'
import type { ModelConfig } from '../model/model.ts'
import type { Engine } from './api.ts'
import type { StoreFacts, TierFacts } from '../tier/tier.ts'
import { EngineClient } from './client.ts'
import type { Watermarks } from './offload.ts'
import type { HostTierFacts, OffloadPlace, RingPlace } from './messages.ts'
import { choosePlace, mib, type Place, type PlaceOptions } from './place.ts'

export interface EngineOptions extends PlaceOptions {
  /** How the API names the model. */
  modelId: string
  /** Longest sequence; the model's own by default. */
  contextLength?: number
  /** How much of it cached prefixes may keep; 0, the default, is no prefix cache. */
  prefixCacheBytes?: number
  prefixEviction?: EvictionName
  /** Answers are cached as prompts are. */
  prefixCacheOutput?: boolean
  /** A file for KV that memory has no room for. */
  kvOffload?: OffloadPlace
  /** When cached prefixes go there. */
  kvWatermarks?: Watermarks
  maxQueue?: number
  /** Where the kernel says which clients have gone. */
  disconnects?: RingPlace
  /** Hears of what takes long, before it begins. */
  onStarting?: (what: string) => void
}

export interface StartedEngine {
  engine: Engine
  /** What was decided and why, a line each. */
  report: string[]
}

/** A sequence has a prompt and an output token at least. */
const CONTEXT_MIN = 2

/**
 * @throws LatticeError from opening the model, `backend_unavailable`, or `usage` for options that
 *   contradict the model or the machine.
 */
export async function startEngine(path: string, options: EngineOptions): Promise<StartedEngine> {
  const model = openModel(path)
  const { config } = model
  const place = await choosePlace(path, model, options)
  const { kvBytes, chunkTokensMin } = place
  const prefixCacheBytes = options.prefixCacheBytes ?? 0
  assertUseful(options, kvBytes)
  const contextLength = chooseContext(config, place, options.contextLength)
  assertHoldsPrompts(prefixCacheBytes, place.layout(contextLength), chunkTokensMin)
  const maxSequences = options.maxSequences ?? MAX_SEQUENCES_DEFAULT
  const maxQueue = options.maxQueue ?? MAX_QUEUE_DEFAULT
  const stepTokensMin = stepTokensNeeded(maxSequences, chunkTokensMin)
  const stepTokens = options.stepTokens ?? Math.max(place.stepTokens, stepTokensMin)
  if (stepTokens < stepTokensMin) {
    throw new LatticeError(
      'usage',
      `A step of ${stepTokens} tokens is too small for ${maxSequences} sequences and a prompt.`,
      { todo: `Give --step-tokens ${stepTokensMin} or more, or fewer --max-sequences.` },
    )
  }
  const engine = await EngineClient.start(
    {
      backend: place.backend,
      contextLength,
      maxSequences,
      stepTokens,
      kvBytes,
      prefixCacheBytes,
      prefixEviction: options.prefixEviction ?? EVICTION_DEFAULT,
      prefixCacheOutput: options.prefixCacheOutput ?? false,
      ...(options.kvWatermarks && { kvWatermarks: options.kvWatermarks }),
      ...(options.disconnects && { disconnects: options.disconnects }),
      ...offloadPlace(options),
    },
    {
      id: options.modelId,
      architecture: config.architecture,
      contextLength,
      vocabSize: config.vocab,
    },
    { sequences: maxSequences + maxQueue, contextLength },
    options.onStarting,
  )
  const { layout, tier, hostTier, started } = engine.facts
  const tokenBytes = liveBytes(layout, 1)
  const shortened =
    contextLength < config.contextLength && options.contextLength === undefined
      ? `, what the KV memory holds of the model's ${config.contextLength}`
      : ''
  const whence = options.kvMemoryBytes === undefined ? place.whence : 'as asked'
  const answers = options.prefixCacheOutput ? ' and answers' : ''
  const report = [
    `model    ${config.name} (${config.architecture}), context ${contextLength} tokens${shortened}`,
    `device   ${place.describe(engine.facts)}`,
    `memory   KV up to ${mib(kvBytes)} (${whence}),` +
      ` ${Math.floor(kvBytes / tokenBytes)} tokens at ${(tokenBytes / 1024).toFixed(1)} KiB each` +
      (prefixCacheBytes > 0
        ? `, ${mib(prefixCacheBytes)} of it for cached prefixes${answers}`
        : ''),
    ...(started === undefined ? [] : [`start    ${started}`]),
    ...(hostTier ? [`tier     ${describeHostTier(hostTier)}`] : []),
    ...(tier ? [`tier     ${describeTier(tier, hostTier)}`] : []),
    ...(tier?.store ? [`store    ${describeStore(tier.store)}`] : []),
    `limits   ${maxSequences} sequences at once, ${maxQueue} waiting, ${stepTokens} tokens a step`,
  ]
  return { engine, report }
}

/** @throws LatticeError `usage` for an option that nothing would come of without another one */
function assertUseful(options: EngineOptions, kvBytes: number): void {
  const { prefixCacheBytes = 0, prefixEviction, prefixCacheOutput, kvWatermarks, kvStore } = options
  if (prefixCacheBytes > kvBytes) {
    throw new LatticeError(
      'usage',
      `A prefix cache of ${mib(prefixCacheBytes)} is more than the KV memory's ${mib(kvBytes)}.`,
      { todo: 'Give --prefix-cache as much as --kv-memory or less.' },
    )
  }
  if (kvWatermarks && !options.kvOffload && !options.kvHostBytes) {
    throw new LatticeError('usage', '--kv-watermark says when KV goes elsewhere; it cannot.', {
      todo: 'Give --kv-offload SIZE too, or on a GPU --kv-host SIZE.',
    })
  }
  if (prefixCacheBytes > 0) return
  const aboutPrompts = {
    '--prefix-eviction': prefixEviction,
    '--prefix-cache-output': prefixCacheOutput,
    '--kv-watermark': kvWatermarks,
    '--kv-store': kvStore,
  }
  for (const [flag, value] of Object.entries(aboutPrompts)) {
    if (!value) continue
    throw new LatticeError('usage', `${flag} is about cached prompts, and none are cached.`, {
      todo: `Give --prefix-cache SIZE too, or leave ${flag} out.`,
    })
  }
}

/** @throws LatticeError `usage` for a prefix cache that is too small for the shortest prompt */
function assertHoldsPrompts(prefixCacheBytes: number, layout: KvLayout, tokens: number): void {
  const leastBytes = pagesFor(layout, Math.max(1, tokens)) * layout.shape.pageBytes
  if (prefixCacheBytes === 0 || prefixCacheBytes >= leastBytes) return
  throw new LatticeError(
    'usage',
    `A prefix cache of ${prefixCacheBytes} bytes holds no prompt: the shortest that is cached` +
      ` has ${Math.max(1, tokens)} tokens, ${leastBytes} bytes.`,
    { todo: 'Give --prefix-cache more: room for some thousand tokens, or leave it out.' },
  )
}

/**
 * The longest sequence: as asked, else the model's own, or what the KV memory holds of it.
 * @throws LatticeError `usage` if what was asked for does not fit the model or the memory
 */
function chooseContext(
  config: ModelConfig,
  { kvBytes, layout: layoutFor }: Place,
  asked: number | undefined,
): number {
  if (asked !== undefined && asked > config.contextLength) {
    throw new LatticeError(
      'usage',
      `A context of ${asked} was asked for; the model was trained for ${config.contextLength}.`,
      { todo: `Give --context ${config.contextLength} or less.` },
    )
  }
  const layout = layoutFor(config.contextLength)
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
      `${kvBytes} bytes of KV memory hold ${fitting} tokens, too few for any sequence.`,
      { todo: `Give --kv-memory ${Math.ceil(leastBytes / 1024)}K or more.` },
    )
  }
  return asked ?? Math.min(config.contextLength, fitting)
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

function describeStore({ directory, prefixes, tokens, lost, beyond }: StoreFacts): string {
  const gone = lost === 0 ? 'nothing lost' : `${lost} torn or changed records or prefixes lost`
  const smaller = `${beyond} left out, as --kv-offload was larger when they were written`
  const kept = `${prefixes} prefixes of ${tokens} tokens kept in ${directory}, ${gone}`
  return beyond === 0 ? kept : `${kept}, ${smaller}`
}

function describeHostTier({ bytes, pinnedMs }: HostTierFacts): string {
  const memory = `${mib(bytes)} of the host's memory, pinned in ${(pinnedMs / 1000).toFixed(1)} s`
  return `KV beyond that in ${memory}`
}

function describeTier({ bytes, file, touches }: TierFacts, host?: HostTierFacts): string {
  const { path, direct, tmpfs } = file
  const cache = direct ? 'past the page cache' : 'through the page cache: its disk knows no other'
  const memory = tmpfs ? ' (which is memory itself: a tmpfs)' : ''
  const waits = {
    all: 'a touch of what is absent waits for it',
    user: 'a touch of what is absent waits for it (user code only: no right to more)',
    none: 'no right to userfaultfd, so a reload is waited for as a whole',
  }
  const where = `${mib(bytes)} encrypted in ${path}${memory}, ${cache}`
  return `KV beyond that on disk, ${where}${host ? '' : `; ${waits[touches]}`}`
}
