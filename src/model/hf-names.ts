// Owns the translation of Hugging Face tensor names to canonical (GGUF) ones.

import type { Architecture } from './model.ts'

const GLOBAL: Readonly<Record<string, string>> = {
  'embed_tokens.weight': 'token_embd.weight',
  'norm.weight': 'output_norm.weight',
  'lm_head.weight': 'output.weight',
}

const LAYER: Readonly<Record<string, string>> = {
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'self_attn.q_norm': 'attn_q_norm',
  'self_attn.k_norm': 'attn_k_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
  input_layernorm: 'attn_norm',
  post_attention_layernorm: 'ffn_norm',
}

/** Gemma 3 normalises after attention and feed-forward too, and calls these by other names. */
const GEMMA3_LAYER: Readonly<Record<string, string>> = {
  ...LAYER,
  post_attention_layernorm: 'post_attention_norm',
  pre_feedforward_layernorm: 'ffn_norm',
  post_feedforward_layernorm: 'post_ffw_norm',
}

const PREFIX = /^(?:model\.language_model\.|language_model\.model\.|language_model\.|model\.)/
const VISION = /^(?:model\.)?(?:vision_tower|multi_modal_projector)\./
const PER_LAYER = /^layers\.(?<layer>\d+)\.(?<part>.+)\.(?<kind>weight|bias)$/

/**
 * The canonical name of a tensor; undefined for those that text needs none of (image encoders,
 * frequencies that are computed). A name that no architecture has stays as it is.
 */
export function canonicalName(name: string, architecture: Architecture): string | undefined {
  if (name.endsWith('.rotary_emb.inv_freq')) return undefined
  if (architecture === 'gemma3' && VISION.test(name)) return undefined
  const short = name.replace(PREFIX, '')
  if (Object.hasOwn(GLOBAL, short)) return GLOBAL[short]
  const { layer, part, kind } = PER_LAYER.exec(short)?.groups ?? {}
  const parts = architecture === 'gemma3' ? GEMMA3_LAYER : LAYER
  if (part === undefined || !Object.hasOwn(parts, part)) return name
  return `blk.${Number(layer)}.${parts[part]}.${kind}`
}
