// Owns what `run` and `chat` share: a model, its engine and its texts in this very process, and
// one answer streamed from it.

import type { RingPlace, StorePlace } from '../engine/messages.ts'
import { type BeamParams, type Engine, GREEDY } from '../engine/api.ts'
import type { Generation, GenerationRequest } from '../engine/generation.ts'
import { LatticeError } from '../errors.ts'
import type { ChatTemplate } from '../text/chat-template.ts'
import type { Tokenizer } from '../text/tokenizer.ts'
import {
  ANSWER_TOKENS_DEFAULT,
  defined,
  type EngineOptions,
  type SamplingOptions,
  samplingParams,
} from './options.ts'

/** A type, not an interface: templates take any record. */
export type ChatMessage = { role: 'system' | 'user' | 'assistant'; content: string }

export interface Session {
  modelId: string
  engine: Engine
  tokenizer: Tokenizer
  /** Of the model's file or folder. */
  path: string
  template: ChatTemplate | undefined
  /** What the engine chose: CPU variant, threads, limits; a line each. */
  report: string[]
  loadMs: number
}

/** How many sequences may run at once, and how many may wait. */
export interface Capacity {
  maxSequences?: number
  maxQueue?: number
  stepTokens?: number
  /** Where the kernel says which clients have gone. */
  disconnects?: RingPlace
}

export interface Answer {
  text: string
  reason: 'stop' | 'length' | 'abort'
  promptTokens: number
  outputTokens: number
  seed: number
  /** Of a beam search: what its answer was ranked by. */
  score: number | undefined
  /** From the request to the first token, and to the last. */
  ttftMs: number
  totalMs: number
}

/** Finds the model (fetching the default if there is none), loads it and starts its engine. */
export async function openSession(
  options: EngineOptions,
  capacity: Capacity = { maxSequences: 1 },
): Promise<Session> {
  const [
    { resolveModel },
    { openModel },
    { loadTokenizer, loadChatTemplate },
    { startEngine },
    { DUMMY_PREFIX },
  ] = await Promise.all([
    import('../model/registry.ts'),
    import('../model/load.ts'),
    import('../text/load.ts'),
    import('../engine/start.ts'),
    import('../model/dummy.ts'),
  ])
  // By name: whoever gives more than a capacity must not overwrite what is decided here.
  const { maxSequences, maxQueue, stepTokens, disconnects } = capacity
  const { id, path } = await resolveModel(options.model)
  const started = performance.now()
  const model = openModel(path)
  if (path.startsWith(DUMMY_PREFIX)) {
    throw new LatticeError('usage', `${id} is a shape without words: it reads and says nothing.`, {
      todo: 'Measure it with `lattice bench gpu`, or take a model with files.',
    })
  }
  // The engine's thread loads weights while this one builds the tokenizer.
  const starting = startEngine(path, {
    modelId: id,
    device: options.device,
    // What takes long is said at once, and on stderr: stdout may be an answer's.
    onStarting: (what) => void process.stderr.write(`${what} …\n`),
    ...defined({
      threads: options.threads,
      quantization: options.quantization,
      contextLength: options.context,
      kvMemoryBytes: options.kvMemory,
      prefixCacheBytes: options.prefixCache,
      kvIdleReleaseMs:
        options.kvIdleRelease === undefined ? undefined : options.kvIdleRelease * 1000,
      prefixEviction: options.prefixEviction,
      prefixCacheOutput: options.prefixCacheOutput === 'on',
      kvHostBytes: options.kvHost,
      kvOffload: options.kvOffload,
      kvWatermarks: options.kvWatermark,
      kvStore: storePlace(options),
      maxSequences,
      maxQueue,
      stepTokens,
      disconnects,
    }),
  })
  starting.catch(() => {})
  try {
    const tokenizer = loadTokenizer(model)
    const template = loadChatTemplate(model, tokenizer)
    const { engine, report } = await starting
    const loadMs = performance.now() - started
    return { modelId: id, path, engine, tokenizer, template, report, loadMs }
  } catch (thrown) {
    // Its thread would keep the process alive.
    await starting.then(({ engine }) => engine.close()).catch(() => {})
    throw thrown
  }
}

/** @throws LatticeError `usage` for a directory without a key, or a key without one */
function storePlace({ kvStore, kvStoreKey }: EngineOptions): StorePlace | undefined {
  if (kvStore !== undefined && kvStoreKey !== undefined) {
    return { directory: kvStore, key: kvStoreKey }
  }
  if (kvStore === undefined && kvStoreKey === undefined) return undefined
  throw new LatticeError('usage', 'A KV store is a directory and a key.', {
    todo: 'Give --kv-store DIR and --kv-store-key FILE (or keyring:NAME) together.',
  })
}

/** The conversation as the model was trained to read it, up to where its answer begins. */
export function chatPrompt(session: Session, messages: readonly ChatMessage[]): Int32Array {
  if (session.template === undefined) {
    throw new LatticeError('template_invalid', `${session.modelId} has no chat template.`, {
      todo: 'It is a model for plain completion: use `lattice run --raw "Once upon a time"`.',
    })
  }
  const text = session.template.render(messages, { addGenerationPrompt: true })
  return session.tokenizer.encode(text, { addSpecial: false, parseSpecial: true })
}

/** What an answer depends on besides its prompt. */
export interface AnswerOptions extends SamplingOptions {
  ignoreEos?: boolean
  /** Instead of sampling. */
  search?: BeamParams
}

/**
 * Streams one answer to `write`; `interrupt` ends it early, with reason "abort".
 * @throws LatticeError as `generate` does, and the engine's own if the answer fails midway.
 */
export async function answer(
  session: Session,
  prompt: Int32Array,
  options: AnswerOptions,
  write: (text: string) => void,
  interrupt: AbortSignal,
): Promise<Answer> {
  const { generate } = await import('../engine/generation.ts')
  const request = generationRequest(session, prompt, options)
  const started = performance.now()
  const generation: Generation = generate(session.engine, session.tokenizer, request)
  const abort = (): void => generation.abort()
  interrupt.addEventListener('abort', abort)
  let text = ''
  let ttftMs: number | undefined
  try {
    for await (const event of generation.events) {
      if (event.kind === 'delta') {
        ttftMs ??= performance.now() - started
        text += event.text
        if (event.text !== '') write(event.text)
        continue
      }
      if (event.reason === 'error') {
        throw event.error ?? new LatticeError('internal', 'The answer failed without saying why.')
      }
      const totalMs = performance.now() - started
      return {
        text,
        reason: event.reason,
        promptTokens: prompt.length,
        outputTokens: event.outputTokens,
        seed: request.sampling.seed,
        score: options.search && event.score,
        ttftMs: ttftMs ?? totalMs,
        totalMs,
      }
    }
  } finally {
    interrupt.removeEventListener('abort', abort)
  }
  throw new LatticeError('internal', 'The answer ended without saying why.')
}

function generationRequest(
  session: Session,
  prompt: Int32Array,
  options: AnswerOptions,
): GenerationRequest {
  const room = session.engine.model.contextLength - prompt.length
  return {
    requestId: crypto.randomUUID(),
    tenant: 'default',
    prompt,
    choices: 1,
    sampling: options.search ? GREEDY : samplingParams(options),
    ...(options.search ? { beams: options.search } : {}),
    // A full context is refused by the engine, which names both numbers.
    maxTokens: options.maxTokens ?? Math.max(1, Math.min(ANSWER_TOKENS_DEFAULT, room)),
    stop: options.stop ?? [],
    ignoreEos: options.ignoreEos ?? false,
    topLogprobs: undefined,
  }
}
