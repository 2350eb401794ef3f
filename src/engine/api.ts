// Owns the contract between those who want tokens (server, CLI) and the engine that makes them.
// Everything in a request survives structured clone: the engine may live on another thread.

import type { LatticeError } from '../errors.ts'
import type { KvMap } from '../kv/map.ts'

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
  /** Called once, last. `outputTokens` includes the stop token. */
  onFinish(reason: FinishReason, outputTokens: number, error: LatticeError | undefined): void
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
}

export interface SequenceSnapshot {
  /** No other sequence of this engine has had it. */
  id: number
  requestId: string
  tenant: string
  /** A preempted sequence waits again, then is in prefill until its output is recomputed too. */
  state: 'waiting' | 'prefill' | 'decode'
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

/** What an engine is asked, or told to do with its memory, between two steps. */
export type EngineQuestion =
  | { kind: 'pinned'; tenant: string }
  /** The prefix stays cached for a while. */
  | { kind: 'unpin'; tenant: string; id: string }
  /** Every page in use; takes longer than a snapshot. */
  | { kind: 'map' }

/** The answer to each kind of question. */
export interface EngineAnswers {
  /** Of this tenant's. */
  pinned: PinnedPrefix[]
  /** False if the tenant has no such prefix. */
  unpin: boolean
  map: { snapshot: EngineSnapshot; map: KvMap }
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
  preemptions: number
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
   * @returns a handle for each, in order
   * @throws LatticeError as `submit` does
   */
  submitChoices(request: SequenceRequest, choices: readonly SequenceChoice[]): SequenceHandle[]
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
