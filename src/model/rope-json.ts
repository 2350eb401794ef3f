// Owns the reading of rope settings from config.json, in the old form (rope_theta, rope_scaling)
// and in the new one (rope_parameters, nested by layer type for Gemma 3).

import { unsupported } from './config.ts'
import type { JsonObject } from './json.ts'
import type { RopeConfig, RopeScaling } from './model.ts'

/** What rope settings are read against. */
export interface RopeFacts {
  headDim: number
  contextLength: number
  /** Base where the file names none. */
  defaultBase: number
}

/**
 * The rope of a model's layers, or of its full-attention ones.
 * @throws LatticeError `model_unsupported` for a kind that cannot be computed
 */
export function ropeFromJson(json: JsonObject, facts: RopeFacts): RopeConfig {
  const all = json.object('rope_parameters')
  const nested = all?.object('full_attention')
  const old = json.object('rope_scaling')
  return ropeConfig(nested ?? all ?? old, json, json.number('rope_theta'), facts)
}

/** The rope of Gemma 3's sliding-window layers: its own base, unscaled unless settings say. */
export function localRopeFromJson(json: JsonObject, facts: RopeFacts): RopeConfig {
  const nested = json.object('rope_parameters')?.object('sliding_attention')
  return ropeConfig(nested, json, json.number('rope_local_base_freq'), facts)
}

function ropeConfig(
  settings: JsonObject | undefined,
  json: JsonObject,
  oldBase: number | undefined,
  facts: RopeFacts,
): RopeConfig {
  const base = settings?.number('rope_theta') ?? oldBase ?? facts.defaultBase
  const part =
    settings?.number('partial_rotary_factor') ?? json.number('partial_rotary_factor') ?? 1
  const dimensions = Math.trunc(facts.headDim * part)
  const scaling = settings ? scalingFromJson(settings, base, dimensions, facts) : NONE
  return { base, dimensions, pairing: 'halves', scaling }
}

const NONE: RopeScaling = { kind: 'none' }

function scalingFromJson(
  settings: JsonObject,
  base: number,
  dimensions: number,
  facts: RopeFacts,
): RopeScaling {
  const type = settings.text('rope_type') ?? settings.text('type') ?? 'default'
  if (settings.has('mrope_section')) throw uncomputable(settings, 'rope over several axes')
  if (type === 'default') return NONE
  if (type === 'linear') return { kind: 'linear', factor: settings.need('factor') }
  if (type === 'yarn') return yarn(settings, facts)
  if (type === 'llama3') {
    return { kind: 'factors', divisors: llama3Divisors(settings, base, dimensions, facts) }
  }
  throw uncomputable(settings, `rope scaling ${JSON.stringify(type)}`)
}

function uncomputable(settings: JsonObject, what: string) {
  const todo = 'Rope scaling may be default, linear, yarn or llama3.'
  return unsupported(settings.path, `${what} cannot be computed`, todo)
}

function originalContext(settings: JsonObject, facts: RopeFacts): number {
  return settings.number('original_max_position_embeddings') ?? facts.contextLength
}

function yarn(settings: JsonObject, facts: RopeFacts): RopeScaling {
  if (settings.flag('truncate') === false) throw uncomputable(settings, 'untruncated YaRN')
  const original = originalContext(settings, facts)
  const factor = settings.number('factor') ?? facts.contextLength / original
  const usual = (scale: number) => 0.1 * scale * Math.log(Math.max(1, factor)) + 1
  const scale = settings.number('mscale') ?? 0
  const scaleAll = settings.number('mscale_all_dim') ?? 0
  const ratio = scale && scaleAll ? usual(scale) / usual(scaleAll) : usual(1)
  return {
    kind: 'yarn',
    factor,
    originalContext: original,
    betaFast: settings.number('beta_fast') ?? 32,
    betaSlow: settings.number('beta_slow') ?? 1,
    attentionFactor: settings.number('attention_factor') ?? ratio,
  }
}

/**
 * Divisors of each frequency: 1 where a wave fits often into the original context, `factor` where
 * it hardly fits, and a smooth step between (Llama 3.1, Grattafiori et al. 2024, and its release).
 */
function llama3Divisors(
  settings: JsonObject,
  base: number,
  dimensions: number,
  facts: RopeFacts,
): Float32Array {
  const factor = settings.need('factor')
  const low = settings.need('low_freq_factor')
  const high = settings.need('high_freq_factor')
  const original = originalContext(settings, facts)
  return Float32Array.from({ length: dimensions / 2 }, (_, i) => {
    const wavelength = 2 * Math.PI * base ** ((2 * i) / dimensions)
    if (wavelength < original / high) return 1
    if (wavelength > original / low) return factor
    const smooth = (original / wavelength - low) / (high - low)
    return 1 / ((1 - smooth) / factor + smooth)
  })
}
