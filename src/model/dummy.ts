// Owns models without files: the shapes of well-known ones, whose weights a backend makes up. They
// are for measuring; what they say means nothing.

import { LatticeError } from '../errors.ts'
import type { Architecture, Model, ModelConfig, TensorRef } from './model.ts'

export const DUMMY_PREFIX = 'dummy:'

interface Shape {
  architecture: Architecture
  layers: number
  hidden: number
  heads: number
  kvHeads: number
  headDim: number
  feedForward: number
  vocab: number
  contextLength: number
  base: number
  /** Whether the output matrix is the embedding. */
  tied?: boolean
}

/** As the models' configurations have them. */
const SHAPES: Readonly<Record<string, Shape>> = {
  'llama-3.1-8b': {
    architecture: 'llama',
    layers: 32,
    hidden: 4096,
    heads: 32,
    kvHeads: 8,
    headDim: 128,
    feedForward: 14336,
    vocab: 128256,
    contextLength: 131072,
    base: 500000,
  },
  'llama-3.2-1b': {
    architecture: 'llama',
    layers: 16,
    hidden: 2048,
    heads: 32,
    kvHeads: 8,
    headDim: 64,
    feedForward: 8192,
    vocab: 128256,
    contextLength: 131072,
    base: 500000,
    tied: true,
  },
  'qwen3-8b': {
    architecture: 'qwen3',
    layers: 36,
    hidden: 4096,
    heads: 32,
    kvHeads: 8,
    headDim: 128,
    feedForward: 12288,
    vocab: 151936,
    contextLength: 40960,
    base: 1000000,
  },
  'smollm2-135m': {
    architecture: 'llama',
    layers: 30,
    hidden: 576,
    heads: 9,
    kvHeads: 3,
    headDim: 64,
    feedForward: 1536,
    vocab: 49152,
    contextLength: 8192,
    base: 100000,
    tied: true,
  },
}

/**
 * A model of a well-known shape: `dummy:llama-3.1-8b`.
 * @throws LatticeError `model_not_found` listing the shapes
 */
export function dummyModel(reference: string): Model {
  const name = reference.replace(DUMMY_PREFIX, '')
  const shape = SHAPES[name]
  if (!shape) {
    throw new LatticeError('model_not_found', `There is no shape called ${name}.`, {
      todo: `Use one of ${Object.keys(SHAPES)
        .map((known) => DUMMY_PREFIX + known)
        .join(', ')}.`,
    })
  }
  const { base, tied = false, ...sizes } = shape
  const config: ModelConfig = {
    ...sizes,
    name: reference,
    normEps: 1e-5,
    rope: { base, dimensions: shape.headDim, pairing: 'halves', scaling: { kind: 'none' } },
    ropeLocal: undefined,
    slidingWindow: undefined,
    attentionScale: 1 / Math.sqrt(shape.headDim),
    embeddingScale: 1,
  }
  return {
    format: 'safetensors',
    config,
    files: [],
    tensors: tensorsOf(config, tied),
    metadata: new Map(),
    tokenizerJson: undefined,
    chatTemplate: undefined,
    normWeightOffset: 0,
  }
}

/** Whether a model has no files, so that its weights are to be made up. */
export function isDummy(model: Model): boolean {
  return model.files.length === 0
}

/** Every tensor that a program of this configuration could ask for, at no place. */
function tensorsOf(config: ModelConfig, tied: boolean): Map<string, TensorRef> {
  const { hidden, heads, kvHeads, headDim, feedForward, vocab, layers } = config
  const tensors = new Map<string, TensorRef>()
  const add = (name: string, ...shape: number[]) => {
    const byteLength = shape.reduce((product, n) => product * n, 2)
    tensors.set(name, { name, type: 'BF16', shape, file: 0, offset: 0, byteLength })
  }
  add('token_embd.weight', hidden, vocab)
  add('output_norm.weight', hidden)
  if (!tied) add('output.weight', hidden, vocab)
  for (let layer = 0; layer < layers; layer++) {
    const blk = `blk.${layer}`
    for (const norm of ['attn_norm', 'ffn_norm']) add(`${blk}.${norm}.weight`, hidden)
    if (config.architecture === 'qwen3') {
      for (const norm of ['attn_q_norm', 'attn_k_norm']) add(`${blk}.${norm}.weight`, headDim)
    }
    add(`${blk}.attn_q.weight`, hidden, heads * headDim)
    add(`${blk}.attn_k.weight`, hidden, kvHeads * headDim)
    add(`${blk}.attn_v.weight`, hidden, kvHeads * headDim)
    add(`${blk}.attn_output.weight`, heads * headDim, hidden)
    add(`${blk}.ffn_gate.weight`, hidden, feedForward)
    add(`${blk}.ffn_up.weight`, hidden, feedForward)
    add(`${blk}.ffn_down.weight`, feedForward, hidden)
  }
  return tensors
}
