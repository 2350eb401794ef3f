// Owns the reading of hyper-parameters from GGUF metadata. Source: the keys that ggml's
// docs/gguf.md lists, and llama.cpp's defaults where a key is missing.

import { LatticeError } from '../errors.ts'
import { MODEL_MAX_LAYERS } from '../limits.ts'
import { ARCHITECTURES, checkConfig, type ConfigAndWeights, unsupported } from './config.ts'
import type { Architecture, MetadataValue, ModelConfig, RopeConfig, RopeScaling } from './model.ts'

/** What a configuration needs besides the metadata. */
export interface GgufFacts {
  path: string
  /** Rows of token_embd.weight. */
  vocab: number
  /** Contents of rope_freqs.weight, where the file has it. */
  ropeDivisors: Float32Array | undefined
}

/**
 * The configuration that a file's metadata describes.
 * @throws LatticeError `gguf_invalid` for a missing or mistyped key, `model_unsupported` for what
 *   cannot be computed (other architectures, experts, soft-capping, other rope scalings)
 */
export function configFromGguf(
  metadata: ReadonlyMap<string, MetadataValue>,
  facts: GgufFacts,
): ConfigAndWeights {
  const { path } = facts
  const keys = new Keys(metadata, path)
  const architecture = architectureOf(keys, path)
  refuseUncomputable(keys, path)
  const layers = keys.count('block_count')
  if (layers > MODEL_MAX_LAYERS) {
    const todo = 'The file is damaged: take another one.'
    throw unsupported(path, `${layers} layers are more than ${MODEL_MAX_LAYERS}`, todo)
  }
  const hidden = keys.count('embedding_length')
  const heads = keys.count('attention.head_count')
  const headDim = keys.optionalCount('attention.key_length') ?? hidden / heads
  const valueDim = keys.optionalCount('attention.value_length') ?? hidden / heads
  if (valueDim !== headDim) {
    const what = `keys have ${headDim} dimensions a head, values ${valueDim}`
    throw unsupported(path, what, 'Only models where both are equal can be run.')
  }
  const slidingWindow = slidingWindowOf(keys, architecture, layers)
  const rope = ropeOf(keys, architecture, headDim, facts)
  const config: ModelConfig = {
    architecture,
    name: keys.text('general.name') ?? baseName(path),
    layers,
    hidden,
    heads,
    kvHeads: keys.optionalCount('attention.head_count_kv') ?? heads,
    headDim,
    feedForward: keys.count('feed_forward_length'),
    vocab: facts.vocab,
    contextLength: keys.count('context_length'),
    normEps: keys.number('attention.layer_norm_rms_epsilon'),
    rope,
    ropeLocal: slidingWindow && architecture === 'gemma3' ? localRope(keys, rope) : undefined,
    slidingWindow,
    attentionScale: attentionScaleOf(architecture, layers, hidden, heads, headDim),
    embeddingScale: architecture === 'gemma3' ? Math.sqrt(hidden) : 1,
  }
  checkConfig(config, path)
  const biases = { attention: architecture === 'qwen2', feedForward: false }
  return { config, biases, tiedOutput: 'maybe' }
}

function baseName(path: string): string {
  return path.slice(path.lastIndexOf('/') + 1).replace(/\.gguf$/i, '')
}

function architectureOf(keys: Keys, path: string): Architecture {
  const name = keys.text('general.architecture')
  if (name === undefined) throw keys.wrong('general.architecture', 'is missing')
  const architecture = ARCHITECTURES.find((known) => known === name)
  if (architecture === undefined) {
    const todo = `Take a model of one of these: ${ARCHITECTURES.join(', ')}.`
    throw unsupported(path, `the architecture ${JSON.stringify(name)} cannot be run`, todo)
  }
  keys.prefix = architecture
  return architecture
}

/** Keys that change results and that no program computes: absent or neutral, or refused. */
const NEUTRAL: readonly (readonly [key: string, neutral: number, what: string])[] = [
  ['expert_count', 0, 'mixture of experts'],
  ['attn_logit_softcapping', 0, 'soft-capping of attention scores'],
  ['final_logit_softcapping', 0, 'soft-capping of logits'],
  ['attention.max_alibi_bias', 0, 'ALiBi'],
  ['attention.clamp_kqv', 0, 'clamping of queries, keys and values'],
  ['logit_scale', 1, 'scaling of logits'],
  ['residual_scale', 1, 'scaling of residuals'],
  ['embedding_scale', 1, 'scaling of embeddings'],
  ['attention.scale', 0, 'a scale of its own for attention'],
  ['rope.scaling.alpha', 0, 'NTK-alpha rope scaling'],
  ['rope.scaling.yarn_log_multiplier', 0, "DeepSeek's YaRN multiplier"],
  ['rope.scaling.yarn_ext_factor', 1, 'a YaRN extrapolation factor'],
]

function refuseUncomputable(keys: Keys, path: string): void {
  for (const [key, neutral, what] of NEUTRAL) {
    const value = keys.optionalNumber(key)
    if (value === undefined || value === neutral) continue
    const todo = 'Take a model without it: results would be wrong.'
    throw unsupported(path, `${keys.full(key)} is ${value}: ${what} cannot be computed`, todo)
  }
  if (keys.flag('attention.causal') === false) {
    const todo = 'Take a model that generates text.'
    throw unsupported(path, 'attention is not causal: this is no text generator', todo)
  }
}

/** Gemma 3 makes five of six layers local; others say so with the window, for every layer. */
function slidingWindowOf(
  keys: Keys,
  architecture: Architecture,
  layers: number,
): ModelConfig['slidingWindow'] {
  const tokens = keys.optionalCount('attention.sliding_window')
  if (tokens === undefined || tokens === 0) return undefined
  const pattern = keys.value('attention.sliding_window_pattern')
  if (Array.isArray(pattern) && pattern.length === layers) {
    return { tokens, layers: pattern.map(Boolean) }
  }
  if (pattern !== undefined && !(typeof pattern === 'number' && pattern > 0)) {
    throw keys.wrong('attention.sliding_window_pattern', `does not fit ${layers} layers`)
  }
  const period = pattern ?? (architecture === 'gemma3' ? 6 : undefined)
  const local = (layer: number) => period === undefined || layer % period < period - 1
  return { tokens, layers: Array.from({ length: layers }, (_, layer) => local(layer)) }
}

function ropeOf(
  keys: Keys,
  architecture: Architecture,
  headDim: number,
  facts: GgufFacts,
): RopeConfig {
  return {
    base: keys.optionalNumber('rope.freq_base') ?? 10_000,
    dimensions: keys.optionalCount('rope.dimension_count') ?? headDim,
    pairing: architecture === 'llama' ? 'interleaved' : 'halves',
    scaling: scalingOf(keys, facts),
  }
}

function localRope(keys: Keys, global: RopeConfig): RopeConfig {
  const base = keys.optionalNumber('rope.freq_base_swa') ?? 10_000
  return { ...global, base, scaling: { kind: 'none' } }
}

function scalingOf(keys: Keys, facts: GgufFacts): RopeScaling {
  const scaling = namedScaling(keys, facts)
  if (facts.ropeDivisors === undefined) return scaling
  if (scaling.kind === 'none') return { kind: 'factors', divisors: facts.ropeDivisors }
  const what = `both rope_freqs.weight and ${scaling.kind} rope scaling are given`
  throw unsupported(facts.path, what, 'Take a model with one of the two.')
}

function namedScaling(keys: Keys, facts: GgufFacts): RopeScaling {
  const type = keys.text('rope.scaling.type') ?? 'linear'
  const factor =
    keys.optionalNumber('rope.scaling.factor') ?? keys.optionalNumber('rope.scale_linear') ?? 1
  if (!(factor > 0)) throw keys.wrong('rope.scaling.factor', `is ${factor}`)
  if (type === 'none' || (type === 'linear' && factor === 1)) return { kind: 'none' }
  if (type === 'linear') return { kind: 'linear', factor }
  if (type !== 'yarn') {
    const todo = 'Rope scaling may be none, linear, yarn, or the tensor rope_freqs.weight.'
    throw unsupported(facts.path, `rope scaling ${JSON.stringify(type)} cannot be computed`, todo)
  }
  const usual = 1 + 0.1 * Math.log(Math.max(1, factor))
  const extra = keys.optionalNumber('rope.scaling.attn_factor') ?? 1
  return {
    kind: 'yarn',
    factor,
    originalContext:
      keys.optionalCount('rope.scaling.original_context_length') ?? keys.count('context_length'),
    betaFast: keys.optionalNumber('rope.scaling.yarn_beta_fast') ?? 32,
    betaSlow: keys.optionalNumber('rope.scaling.yarn_beta_slow') ?? 1,
    attentionFactor: keys.optionalNumber('rope.scaling.yarn_attn_factor') ?? usual * extra,
  }
}

/** Gemma 3 27B scales by the hidden size a head, not by the head's; only its depth tells it. */
const GEMMA3_27B_LAYERS = 62

function attentionScaleOf(
  architecture: Architecture,
  layers: number,
  hidden: number,
  heads: number,
  headDim: number,
): number {
  const large = architecture === 'gemma3' && layers === GEMMA3_27B_LAYERS
  return 1 / Math.sqrt(large ? hidden / heads : headDim)
}

/** Typed look-ups; a key that does not start with `general.` is one of the architecture's. */
class Keys {
  prefix = ''
  private readonly metadata: ReadonlyMap<string, MetadataValue>
  private readonly path: string

  constructor(metadata: ReadonlyMap<string, MetadataValue>, path: string) {
    this.metadata = metadata
    this.path = path
  }

  full(key: string): string {
    return key.startsWith('general.') ? key : `${this.prefix}.${key}`
  }

  value(key: string): MetadataValue | undefined {
    return this.metadata.get(this.full(key))
  }

  wrong(key: string, what: string): LatticeError {
    const field = this.full(key)
    return new LatticeError('gguf_invalid', `${this.path}: the metadata key ${field} ${what}.`, {
      todo: 'The file is damaged or was written by a faulty converter: take another one.',
      details: { field },
    })
  }

  text(key: string): string | undefined {
    const value = this.value(key)
    if (value === undefined || typeof value === 'string') return value
    throw this.wrong(key, 'is not a string')
  }

  flag(key: string): boolean | undefined {
    const value = this.value(key)
    if (value === undefined || typeof value === 'boolean') return value
    throw this.wrong(key, 'is not a bool')
  }

  optionalNumber(key: string): number | undefined {
    const value = this.value(key)
    if (value === undefined || typeof value === 'number') return value
    throw this.wrong(key, 'is not a number')
  }

  number(key: string): number {
    const value = this.optionalNumber(key)
    if (value === undefined) throw this.wrong(key, 'is missing')
    return value
  }

  /** A non-negative integer; an array of equal ones counts as one (some converters write these). */
  optionalCount(key: string): number | undefined {
    const value = this.value(key)
    if (value === undefined) return undefined
    const values = ArrayBuffer.isView(value) ? Array.from(value as Int32Array) : [value]
    const [first] = values
    if (typeof first !== 'number' || !Number.isInteger(first) || first < 0) {
      throw this.wrong(key, 'is not a non-negative integer')
    }
    if (values.every((other) => other === first)) return first
    const todo = 'Only models whose layers are all alike can be run.'
    throw unsupported(this.path, `${this.full(key)} differs between layers`, todo)
  }

  count(key: string): number {
    const value = this.optionalCount(key)
    if (value === undefined) throw this.wrong(key, 'is missing')
    return value
  }
}
