// Owns the reading of hyper-parameters from a Hugging Face config.json. Source: transformers'
// configuration classes, whose defaults stand for keys that a file leaves out.

import { MODEL_MAX_LAYERS } from '../limits.ts'
import { checkConfig, type ConfigAndWeights, unsupported } from './config.ts'
import { type JsonObject } from './json.ts'
import type { Architecture, ModelConfig } from './model.ts'
import { localRopeFromJson, type RopeFacts, ropeFromJson } from './rope-json.ts'

/** What transformers assumes of a family where config.json is silent. */
interface Defaults {
  architecture: Architecture
  kvHeads?: number
  heads?: number
  headDim?: number
  contextLength: number
  ropeBase: number
  tied: boolean
  activation: string
}

const LLAMA: Defaults = {
  architecture: 'llama',
  contextLength: 2048,
  ropeBase: 10_000,
  tied: false,
  activation: 'silu',
}

const FAMILIES: Readonly<Record<string, Defaults>> = {
  llama: LLAMA,
  mistral: { ...LLAMA, kvHeads: 8, contextLength: 131_072 },
  qwen2: { ...LLAMA, architecture: 'qwen2', kvHeads: 32, contextLength: 32_768 },
  qwen3: { ...LLAMA, architecture: 'qwen3', kvHeads: 32, headDim: 128, contextLength: 32_768 },
  gemma3_text: {
    architecture: 'gemma3',
    heads: 8,
    kvHeads: 4,
    headDim: 256,
    contextLength: 131_072,
    ropeBase: 1_000_000,
    tied: true,
    activation: 'gelu_pytorch_tanh',
  },
}

/**
 * The configuration that a config.json describes; of a multimodal Gemma 3, its language part.
 * @throws LatticeError `safetensors_invalid` for mistyped keys, `model_unsupported` for what
 *   cannot be computed (other families, quantized checkpoints, soft-capping, rope kinds)
 */
export function configFromJson(outer: JsonObject, name: string): ConfigAndWeights {
  const { path } = outer
  const outerType = outer.text('model_type') ?? 'nothing'
  const inner = outerType === 'gemma3' ? outer.object('text_config') : undefined
  const json = inner ?? outer
  const type = inner ? 'gemma3_text' : outerType
  const family = Object.hasOwn(FAMILIES, type) ? FAMILIES[type] : undefined
  if (family === undefined) {
    const todo = `Take a model of one of these: ${Object.keys(FAMILIES).join(', ')}, gemma3.`
    throw unsupported(path, `the model_type ${JSON.stringify(type)} cannot be run`, todo)
  }
  refuseUncomputable(outer, json, family)
  const layers = json.need('num_hidden_layers')
  if (!(layers > 0 && layers <= MODEL_MAX_LAYERS)) {
    const todo = `Take a model with 1 to ${MODEL_MAX_LAYERS} layers.`
    throw unsupported(path, `num_hidden_layers is ${layers}`, todo)
  }
  const hidden = json.need('hidden_size')
  const heads =
    json.number('num_attention_heads') ?? family.heads ?? json.need('num_attention_heads')
  const headDim = json.number('head_dim') ?? family.headDim ?? Math.trunc(hidden / heads)
  const contextLength = json.number('max_position_embeddings') ?? family.contextLength
  const facts: RopeFacts = { headDim, contextLength, defaultBase: family.ropeBase }
  const gemma = family.architecture === 'gemma3'
  const slidingWindow = slidingWindowOf(json, type, layers)
  const config: ModelConfig = {
    architecture: family.architecture,
    name,
    layers,
    hidden,
    heads,
    kvHeads: kvHeadsOf(json, family, heads),
    headDim,
    feedForward: json.need('intermediate_size'),
    vocab: json.number('vocab_size') ?? (gemma ? 262_208 : json.need('vocab_size')),
    contextLength,
    normEps: json.number('rms_norm_eps') ?? 1e-6,
    rope: ropeFromJson(json, facts),
    ropeLocal:
      gemma && slidingWindow
        ? localRopeFromJson(json, { ...facts, defaultBase: 10_000 })
        : undefined,
    slidingWindow,
    attentionScale: (gemma ? (json.number('query_pre_attn_scalar') ?? 256) : headDim) ** -0.5,
    embeddingScale: gemma ? Math.sqrt(hidden) : 1,
  }
  checkConfig(config, path)
  return {
    config,
    biases: {
      attention: type === 'qwen2' || json.flag('attention_bias') === true,
      feedForward: json.flag('mlp_bias') === true,
    },
    tiedOutput: tiedOutput(outer, json, family),
  }
}

/** Absent means the class's default, null as many as heads. */
function kvHeadsOf(json: JsonObject, family: Defaults, heads: number): number {
  const absent = json.isNull('num_key_value_heads') ? heads : (family.kvHeads ?? heads)
  return json.number('num_key_value_heads') ?? absent
}

function tiedOutput(outer: JsonObject, json: JsonObject, family: Defaults): 'yes' | 'no' {
  const flag = outer.flag('tie_word_embeddings') ?? json.flag('tie_word_embeddings')
  return (flag ?? family.tied) ? 'yes' : 'no'
}

/** Keys that change results and that no program computes. */
const REFUSED = {
  quantization_config: 'checkpoints quantized by other tools',
  attn_logit_softcapping: 'soft-capping of attention scores',
  final_logit_softcapping: 'soft-capping of logits',
  num_local_experts: 'mixture of experts',
  num_experts: 'mixture of experts',
} as const

function refuseUncomputable(outer: JsonObject, json: JsonObject, family: Defaults): void {
  for (const [key, what] of Object.entries(REFUSED)) {
    if (!json.has(key) && !outer.has(key)) continue
    const todo = 'Take a plain f32, f16 or bf16 model, or a quantized one as GGUF.'
    throw unsupported(json.path, `it sets ${key}: ${what} cannot be computed`, todo)
  }
  if (json.flag('use_bidirectional_attention') === true) {
    const todo = 'Take a model that generates text.'
    throw unsupported(json.path, 'attention is not causal: this is no text generator', todo)
  }
  const activation = json.text('hidden_activation') ?? json.text('hidden_act') ?? family.activation
  if (activation === family.activation) return
  const what = `the activation ${JSON.stringify(activation)} cannot be computed`
  throw unsupported(json.path, what, `Models of this family have ${family.activation}.`)
}

/** Mistral: every layer; Qwen: those from max_window_layers on; Gemma 3: five of six. */
function slidingWindowOf(
  json: JsonObject,
  type: string,
  layers: number,
): ModelConfig['slidingWindow'] {
  if (type === 'llama') return undefined
  const qwen = type.startsWith('qwen')
  if (qwen && json.flag('use_sliding_window') !== true) return undefined
  if (json.isNull('sliding_window')) return undefined
  const tokens = json.number('sliding_window') ?? 4096
  const local = layerTypes(json, layers) ?? usualLayers(json, type, layers)
  return local.includes(true) ? { tokens, layers: local } : undefined
}

function usualLayers(json: JsonObject, type: string, layers: number): boolean[] {
  const period = json.number('sliding_window_pattern') ?? 6
  const first = json.number('max_window_layers') ?? 28
  return Array.from({ length: layers }, (_, layer) => {
    if (type === 'gemma3_text') return (layer + 1) % period !== 0
    return type === 'mistral' || layer >= first
  })
}

const LAYER_TYPES = ['full_attention', 'sliding_attention']

function layerTypes(json: JsonObject, layers: number): boolean[] | undefined {
  const types = json.get('layer_types')
  if (types === undefined) return undefined
  if (!Array.isArray(types) || types.length !== layers) {
    throw unsupported(json.path, `layer_types does not name ${layers} layers`, 'Take another copy.')
  }
  return types.map((type) => {
    if (LAYER_TYPES.includes(type)) return type === 'sliding_attention'
    const todo = `Layers may be ${LAYER_TYPES.join(' or ')}.`
    throw unsupported(json.path, `the layer type ${JSON.stringify(type)} cannot be computed`, todo)
  })
}
