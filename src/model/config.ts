// Owns what the two sources of a ModelConfig (GGUF metadata, config.json) share: the error for
// what cannot be run, and the checks that hold for every configuration.

import { LatticeError } from '../errors.ts'
import { MODEL_MAX_LAYERS } from '../limits.ts'
import type { Architecture, ModelConfig } from './model.ts'

export const ARCHITECTURES: readonly Architecture[] = ['llama', 'qwen2', 'qwen3', 'gemma3']

/** A configuration, and what it says of the tensors that go with it. */
export interface ConfigAndWeights {
  config: ModelConfig
  /** Biases that must be there; others may not be. */
  biases: { attention: boolean; feedForward: boolean }
  /** Whether the output matrix is the embedding; maybe: if there is no tensor for it. */
  tiedOutput: 'yes' | 'no' | 'maybe'
}

/** The error for a model that is well-formed, but would not be computed rightly. */
export function unsupported(path: string, what: string, todo: string): LatticeError {
  return new LatticeError('model_unsupported', `${path}: ${what}.`, { todo })
}

/**
 * Checks that sizes are positive and agree with each other.
 * @throws LatticeError `model_unsupported` naming the size that is wrong
 */
export function checkConfig(config: ModelConfig, path: string): void {
  const sizes = ['layers', 'hidden', 'heads', 'kvHeads', 'headDim', 'feedForward', 'vocab'] as const
  for (const size of [...sizes, 'contextLength'] as const) {
    const value = config[size]
    if (Number.isInteger(value) && value > 0 && value < 2 ** 31) continue
    throw unsupported(path, `${size} is ${value}, not a positive integer`, DAMAGED)
  }
  if (config.layers > MODEL_MAX_LAYERS) {
    throw unsupported(path, `${config.layers} layers are more than ${MODEL_MAX_LAYERS}`, DAMAGED)
  }
  if (config.heads % config.kvHeads !== 0) {
    const what = `${config.heads} heads cannot share ${config.kvHeads} key/value heads evenly`
    throw unsupported(path, what, DAMAGED)
  }
  if (!(config.normEps > 0 && config.normEps < 1)) {
    throw unsupported(path, `the norm's epsilon is ${config.normEps}`, DAMAGED)
  }
  for (const rope of [config.rope, config.ropeLocal]) {
    if (rope === undefined) continue
    if (!(rope.base > 1 && Number.isFinite(rope.base))) {
      throw unsupported(path, `the rope base is ${rope.base}`, DAMAGED)
    }
    const { dimensions } = rope
    if (dimensions > 0 && dimensions <= config.headDim && dimensions % 2 === 0) continue
    const what = `rope turns ${dimensions} of ${config.headDim} dimensions of a head`
    throw unsupported(path, what, DAMAGED)
  }
}

const DAMAGED = 'The file is damaged or was written by a faulty converter: take another one.'
