// Owns the contract between those who want tokens (server, CLI) and the engine that makes them.
// Everything in a request survives structured clone: the engine may live on another thread.

import type { LatticeError } from '../errors.ts'
import type { KvMap } from '../kv/map.ts'
import type { Level } from '../kv/outside.ts'
import type { TierLevels } from '../kv/tier.ts'
import type { Watch } from '../kv/prefix-node.ts'

/** How the next token is chosen. Neutral values switch a step off. */
export interface SamplingParams {
  /** 0 is greedy. */
  temperature: number
  /** 0 is off. */
  topK: number
  /** 1 is off. */
  topP: number
  /** 0 is off. */
  minP: number
  /** 1 is off. */
  typicalP: number
  /** 1 is off; over prompt and output tokens (CTRL, Keskar et al. 2019). */
  repetitionPenalty: number
  /** 0 is off; over output tokens (OpenAI's definition). */
  presencePenalty: number
  /** 0 is off; over output tokens (OpenAI's definition). */
  frequencyPenalty: number
  /** Added to the logit of a token id before anything else; -100 bans in practice. */
  logitBias: readonly (readonly [token: number, bias: number])[]
  /** The same seed gives the same tokens whatever the batch around the sequence. */
  seed: number
}

export const GREEDY: SamplingParams = {
  temperature: 0,
  topK: 0,
  topP: 1,
  minP: 0,
  typicalP: 1,
  repetitionPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  logitBias: [],
  seed: 0,
}

/** Who waits for a request over TCP: aborted when the kernel says that this connection ended. */
export interface ClientConnection {
  /** As `connectionKey` of src/net/connection-key.ts has it. */
  key: string
  /** On the kernel's monotonic clock: an end before it was another connection's. */
  sinceNs: bigint
}

/** One sequence to generate. */
export interface SequenceRequest {
  /** Shown in `lattice ps`; sequences of one request share it. */
  requestId: string
  /** Who pays; 'default' without API keys. */
  tenant: string
  prompt: Int32Array
  sampling: SamplingParams
  /** Output tokens at most, ≥ 1. prompt + maxTokens must fit the context. */
  maxTokens: number
  /** Token ids that end the sequence (end-of-sequence ids; empty when they are ignored). */
  stopTokens: readonly number[]
  /** Alternatives to report with each token; undefined reports none, 0 only the chosen one. */
  topLogprobs: number | undefined
  /**
   * Keeps the prompt in the prefix cache, under this name of the tenant's, until it is unpinned.
   * The sequence ends with `prefix_memory_exhausted` if it cannot be kept, `invalid_request` if it
   * is too short to be cached.
   */
  pin?: string
  /** Only with an engine that was told where to read of disconnects. */
  connection?: ClientConnection
  /** Beam search instead of sampling, which must be greedy then: the choices are its best. */
  beams?: BeamParams
}

/** A beam search, with the meaning that HF transformers' `generate` gives each. */
export interface BeamParams {
  /** Beams that run side by side (num_beams), ≥ 2; choices of the request at most. */
  width: number
  /** A score is the sum of log-probabilities over the tokens to the power of this. */
  lengthPenalty: number
  /** When to stop. true: at `width` finished; false: no better is likely; 'never': possible. */
  earlyStopping: boolean | 'never'
}

/** Natural logarithms of probabilities under the model's own distribution (before sampling). */
export interface TokenLogprobs {
  logprob: number
  top: readonly { token: number; logprob: number }[]
}

/** stop: a stop token; length: maxTokens reached; abort: the caller asked; error: see the error. */
export type FinishReason = 'stop' | 'length' | 'abort' | 'error'

/** Where a sequence's tokens go. Called on the thread that submitted; must not throw. */
export interface SequenceSink {
  /**
   * Called once, before the first token, when the sequence leaves the queue: its wait is over.
   * `cachedTokens` of its prompt were in memory already, left by other requests.
   */
  onStart?(cachedTokens: number): void
  /** A stop token that ends the sequence is counted but not delivered here. */
  onToken(token: number, logprobs: TokenLogprobs | undefined): void
  /**
   * Called once, last. `outputTokens` includes the stop token, and so does `score`: of a beam what
   * it was ranked by, else the mean log-probability of a token; known if log-probabilities are.
   */
  onFinish(
    reason: FinishReason,
    outputTokens: number,
    error: LatticeError | undefined,
    score?: number,
  ): void
}

/** Where tokens of sequences go that another thread queued. Called on the client's thread. */
export interface DirectSink {
  onStart(id: number, cachedTokens: number): void
  onToken(id: number, token: number): void
  onFinish(
    id: number,
    reason: FinishReason,
    outputTokens: number,
    error: LatticeError | undefined,
  ): void
  /** The engine has stopped: nothing more comes of any of them. */
  onStopped(error: LatticeError): void
}

/** What the other thread is given: `DirectQueue` of src/engine/handover.ts makes use of it. */
export interface DirectPlace {
  memory: SharedArrayBuffer
  counts: SharedArrayBuffer
  signal: SharedArrayBuffer
  /** That run and wait together, at most. */
  sequences: number
  /** Of a prompt and its answer. */
  tokensMax: number
  stopTokens: readonly number[]
}

/** A way past the thread that started the engine. */
export interface DirectWay {
  readonly place: DirectPlace
  /** Sequences of it that run or wait. */
  running(): number
  abort(id: number): void
  /** Nothing comes this way any more; what runs is aborted. Idempotent. */
  close(): void
}

/** One of several answers to the same prompt. */
export interface SequenceChoice {
  /** Instead of the request's own. */
  sampling: SamplingParams
  sink: SequenceSink
}

export interface SequenceHandle {
  /** Ends the sequence; its pages are freed within one step. Idempotent. */
  abort(): void
  /**
   * Begins another sequence where this one is when the engine hears of it, in the same memory
   * until they differ. Its sink is told all tokens, those before the fork too (without logprobs).
   * With the same sampling, seed included, it goes on as this one does.
   * @throws LatticeError `not_found` if this one has ended, `queue_full`, `draining`,
   *   `engine_stopped`. The sink is told `not_found` if it has ended when the engine hears of it,
   *   and `invalid_request` if it is a beam.
   */
  fork(choice: SequenceChoice): SequenceHandle
}

/**
 * A preempted sequence waits again, then is in prefill until its output is computed again too. Or
 * it is offloading until its memory is free, offloaded while it waits, loading until it is back.
 */
export type SequenceState =
  | 'waiting'
  | 'prefill'
  | 'decode'
  | 'offloading'
  | 'offloaded'
  | 'loading'

export interface SequenceSnapshot {
  /** No other sequence of this engine has had it. */
  id: number
  requestId: string
  tenant: string
  state: SequenceState
  promptTokens: number
  /** Tokens whose KV is in memory. */
  kvTokens: number
  outputTokens: number
  /** Pages set aside for it; a prompt gets all of its own when it is let in. */
  pages: number
  /** Bytes of the keys and values in memory, without page rounding. */
  bytes: number
  ageMs: number
}

/** KV outside of memory. */
export interface TierSnapshot {
  /** Of the encrypted file, or of its directory if it has no name. */
  path?: string
  capacityBytes: number
  usedBytes: number
  /** Of a GPU's tier: what lies in memory of the host, and what on a disk beneath. */
  levels?: TierLevels
  /** Written and read since the start. */
  savedBytes: number
  loadedBytes: number
  /** Preempted sequences that were moved out; the others were computed again. */
  offloads: number
  /** Cached prefixes that went out of memory. */
  demotions: number
  /** Prompts for which some came back. */
  fetches: number
  /** Sequences and prefixes computed again in the end because writing or reading failed. */
  lost: number
  /** Touches of pages that were on their way: each waited for its column. */
  faults: number
  /** Prefixes that would outlive the process now (`--kv-store`). */
  kept: number
}

/** A prefix that stays in memory until it is unpinned. */
export interface PinnedPrefix {
  id: string
  tenant: string
  tokens: number
  /** Pages that it refers to, whoever else does. */
  pages: number
  bytes: number
  /** Prompts that began with it since, its own not counted. */
  uses: number
  ageMs: number
}

/** What is cached of a conversation, from its first token on. */
export interface SessionSnapshot {
  id: string
  tokens: number
  /** In memory, those of other sessions with the same beginning included. */
  pages: number
  /** Outside of memory. */
  outPages: number
  /** Of all of them. */
  bytes: number
  /** host: in memory of the host, outside of a GPU's. */
  where: 'memory' | Level | 'both'
  /** It would be there after a crash; absent without a store. */
  durable?: boolean
  /** Since it was last used. */
  idleMs: number
}

/**
 * moving: it is on its way; busy: a sequence uses it, or there is no room; unknown: there is no
 * such session; impossible: there is nowhere to move it.
 */
export type SessionMove = 'done' | 'moving' | 'busy' | 'unknown' | 'impossible'

/** What an engine is asked, or told to do with its memory, between two steps. */
export type EngineQuestion =
  | { kind: 'pinned'; tenant: string }
  /** The prefix stays cached for a while. */
  | { kind: 'unpin'; tenant: string; id: string }
  | { kind: 'sessions'; tenant: string }
  /** Begins to move a session's KV out of memory, or back. */
  | { kind: 'offload' | 'reload'; tenant: string; id: string }
  /** Every page in use; takes longer than a snapshot. */
  | { kind: 'map' }
  /** Which first tokens of a prompt are cached; of each that is, `forgotten` tells the end. */
  | { kind: 'watch'; tenant: string; tokens: Int32Array; prefixes: readonly Watch[] }
  /** Which watched prefixes are not cached any more, since the last time. */
  | { kind: 'forgotten' }

/** The answer to each kind of question. */
export interface EngineAnswers {
  /** Of this tenant's. */
  pinned: PinnedPrefix[]
  /** False if the tenant has no such prefix. */
  unpin: boolean
  /** Of this tenant's, the latest used first. */
  sessions: SessionSnapshot[]
  offload: SessionMove
  reload: SessionMove
  map: { snapshot: EngineSnapshot; map: KvMap }
  /** Ids of those that are cached. */
  watch: string[]
  forgotten: string[]
}

/** Counters only grow; gauges are of now. */
export interface EngineSnapshot {
  sequences: SequenceSnapshot[]
  running: number
  waiting: number
  kv: {
    pageBytes: number
    usedPages: number
    limitPages: number
    /** What the kernel says is resident in the memfd; asked for this snapshot. */
    residentBytes: number
    /** Of the used pages, those that cached prefixes refer to, whoever else does. */
    cachedPages: number
    /** Of the used pages, those that pinned prefixes refer to. */
    pinnedPages: number
    /** What cached prefixes may have; 0 is no prefix cache. */
    prefixLimitPages: number
  }
  /** Prompt tokens looked up in the prefix cache, and found there. */
  prefixQueries: number
  prefixHits: number
  /** Ends of cached prefixes that were forgotten to make room. */
  prefixEvictions: number
  steps: number
  /** Computed, that is: not found in the prefix cache or shared with another choice. */
  promptTokens: number
  outputTokens: number
  finished: Record<FinishReason, number>
  /** Sequences that made room for others. */
  preemptions: number
  /** Absent if there is no memory but the one. */
  tier?: TierSnapshot
  /** Forks of beams that were copied in part, because their tokens lay in too many places. */
  beamCopies: number
  /** Wall time inside the backend's compute and in whole steps, in milliseconds. */
  computeMs: number
  stepMs: number
}

export interface EngineModel {
  /** As /v1/models lists it. */
  id: string
  architecture: string
  contextLength: number
  vocabSize: number
}

export interface Engine {
  readonly model: EngineModel
  /**
   * Queues a sequence.
   * @throws LatticeError `context_length_exceeded`, `queue_full` (nothing was queued),
   *   `draining`, `engine_stopped`, `kv_memory_exhausted` (could never fit).
   */
  submit(request: SequenceRequest, sink: SequenceSink): SequenceHandle
  /**
   * Queues several sequences that share a prompt, which is computed once: all of them or none.
   * Those of a beam search get all of their tokens at its end, the best hypothesis first.
   * @returns a handle for each, in order
   * @throws LatticeError as `submit` does
   */
  submitChoices(request: SequenceRequest, choices: readonly SequenceChoice[]): SequenceHandle[]
  /**
   * Lets another thread queue prompts by itself; absent if none can. One at a time may.
   * @param stopTokens that end each of their answers
   */
  direct?(sink: DirectSink, stopTokens: readonly number[]): DirectWay
  /** Free places in the queue now: how many submits would not throw `queue_full`. */
  queueRoom(): number
  /** What is now or, while a long step is computed, what was shortly before that step began. */
  snapshot(): Promise<EngineSnapshot>
  /** Answered between two steps, so after the one that is computed now. */
  ask<Q extends EngineQuestion>(question: Q): Promise<EngineAnswers[Q['kind']]>
  /** Refuses new sequences, resolves when the last one has ended. */
  drain(): Promise<void>
  /** Ends everything at once. */
  close(): Promise<void>
}
