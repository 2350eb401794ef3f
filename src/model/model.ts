// Owns the one description of a model that every file format is read into and every backend
// takes: hyper-parameters, tensors by their canonical (GGUF) names, tokenizer and template sources.

import type { GgmlType } from './ggml-types.ts'

export type Architecture = 'llama' | 'qwen2' | 'qwen3' | 'gemma3'

/** Rope frequency scaling; see each paper or the model's release notes for the formula. */
export type RopeScaling =
  | { kind: 'none' }
  | { kind: 'linear'; factor: number }
  /** YaRN (Peng et al. 2023). */
  | {
      kind: 'yarn'
      factor: number
      originalContext: number
      betaFast: number
      betaSlow: number
      attentionFactor: number
    }
  /** Llama 3.1: per-frequency divisors; GGUF carries them as the tensor rope_freqs.weight. */
  | { kind: 'factors'; divisors: Float32Array }

export interface RopeConfig {
  /** Base of the geometric frequencies (theta). */
  base: number
  /** Dimensions of each head that are rotated. */
  dimensions: number
  /** interleaved: pairs (2i, 2i+1), as GGUF stores llama; halves: pairs (i, i+d/2), as HF does. */
  pairing: 'interleaved' | 'halves'
  scaling: RopeScaling
}

/** Everything an architecture's program needs to know. Sizes are in elements. */
export interface ModelConfig {
  architecture: Architecture
  /** Human name from the metadata, e.g. "SmolLM2 135M Instruct". */
  name: string
  layers: number
  hidden: number
  heads: number
  kvHeads: number
  headDim: number
  feedForward: number
  vocab: number
  /** Longest sequence the model was trained for. */
  contextLength: number
  normEps: number
  rope: RopeConfig
  /** Gemma 3: rope of its sliding-window layers (base 10,000, unscaled); undefined elsewhere. */
  ropeLocal: RopeConfig | undefined
  /** Sliding-window attention: window in tokens, and which layers use it. */
  slidingWindow: { tokens: number; layers: readonly boolean[] } | undefined
  /** Scale of q·k; 1/sqrt(headDim) for most. */
  attentionScale: number
  /** Multiplies the embedding rows; sqrt(hidden) for Gemma, else 1. */
  embeddingScale: number
}

/** Where one tensor's bytes lie. Shape is in ggml order: shape[0] is contiguous (row length). */
export interface TensorRef {
  name: string
  type: GgmlType
  shape: readonly number[]
  /** Index into `Model.files`. */
  file: number
  offset: number
  byteLength: number
}

export interface ModelFile {
  path: string
  byteLength: number
}

/** A model as read from disk: nothing is loaded yet, offsets have been checked. */
export interface Model {
  format: 'gguf' | 'safetensors'
  config: ModelConfig
  files: readonly ModelFile[]
  /** Canonical names: token_embd.weight, blk.0.attn_q.weight, output_norm.weight … */
  tensors: ReadonlyMap<string, TensorRef>
  /** Typed metadata of a GGUF file; empty for safetensors. */
  metadata: ReadonlyMap<string, MetadataValue>
  /** Parsed tokenizer.json, for safetensors directories. */
  tokenizerJson: unknown
  /** Parsed tokenizer_config.json, for safetensors directories that have one. */
  tokenizerConfig?: unknown
  /** Ids that end a text by generation_config.json or config.json; GGUF metadata has its own. */
  eosTokens?: readonly number[]
  /** Jinja source, if the model has a chat template. */
  chatTemplate: string | undefined
  /**
   * Added to norm weights at load: Gemma's safetensors store w where the maths uses 1 + w
   * (GGUF conversion has added it already). 0 elsewhere.
   */
  normWeightOffset: number
}

/** A GGUF metadata value. 64-bit integers are numbers where safe, else bigint. */
export type MetadataValue =
  | number
  | bigint
  | boolean
  | string
  | readonly string[]
  | readonly boolean[]
  | Uint8Array
  | Int8Array
  | Uint16Array
  | Int16Array
  | Uint32Array
  | Int32Array
  | Float32Array
  | Float64Array
  | BigUint64Array
  | BigInt64Array
  | readonly MetadataValue[]
