// Owns the list of tensors that each architecture's program takes, by canonical name and shape.

import { LatticeError } from '../errors.ts'
import { type ConfigAndWeights, unsupported } from './config.ts'
import type { GgmlType } from './ggml-types.ts'
import type { ModelConfig, TensorRef } from './model.ts'

interface Weight {
  name: string
  shape: readonly number[]
  need: 'required' | 'optional'
}

/**
 * Checks that every tensor that the model needs is there in its exact shape, and nothing that its
 * program would ignore.
 * @throws LatticeError `model_unsupported` naming the tensors
 */
export function checkWeights(
  { config, biases, tiedOutput }: ConfigAndWeights,
  tensors: ReadonlyMap<string, TensorRef>,
  path: string,
): void {
  const expected = new Map(
    [
      ...globalWeights(config, tiedOutput),
      ...Array.from({ length: config.layers }, (_, layer) =>
        layerWeights(config, biases, `blk.${layer}`),
      ).flat(),
    ].map((weight) => [weight.name, weight]),
  )
  const missing = [...expected.values()].filter(
    ({ need, name }) => need === 'required' && !tensors.has(name),
  )
  if (missing.length > 0) throw missingTensors(missing, path, config)
  for (const tensor of tensors.values()) {
    const weight = expected.get(tensor.name)
    if (weight === undefined) throw unknownTensor(tensor, path, config)
    checkTensor(tensor, weight, path)
  }
}

function globalWeights(
  { hidden, vocab, rope }: ModelConfig,
  tied: ConfigAndWeights['tiedOutput'],
): Weight[] {
  const weights: Weight[] = [
    { name: 'token_embd.weight', shape: [hidden, vocab], need: 'required' },
    { name: 'output_norm.weight', shape: [hidden], need: 'required' },
    { name: 'rope_freqs.weight', shape: [rope.dimensions / 2], need: 'optional' },
  ]
  if (tied === 'yes') return weights
  const need = tied === 'no' ? 'required' : 'optional'
  return [...weights, { name: 'output.weight', shape: [hidden, vocab], need }]
}

function layerWeights(
  config: ModelConfig,
  biases: ConfigAndWeights['biases'],
  layer: string,
): Weight[] {
  const { architecture, hidden, heads, kvHeads, headDim, feedForward } = config
  const queries = heads * headDim
  const keys = kvHeads * headDim
  const matrices: [name: string, rows: number, columns: number][] = [
    ['attn_q', hidden, queries],
    ['attn_k', hidden, keys],
    ['attn_v', hidden, keys],
    ['attn_output', queries, hidden],
    ['ffn_gate', hidden, feedForward],
    ['ffn_up', hidden, feedForward],
    ['ffn_down', feedForward, hidden],
  ]
  const norms: [name: string, size: number][] = [
    ['attn_norm', hidden],
    ['ffn_norm', hidden],
  ]
  if (architecture === 'qwen3' || architecture === 'gemma3') {
    norms.push(['attn_q_norm', headDim], ['attn_k_norm', headDim])
  }
  if (architecture === 'gemma3')
    norms.push(['post_attention_norm', hidden], ['post_ffw_norm', hidden])
  return [
    ...matrices.map(([name, ...shape]) => required(`${layer}.${name}.weight`, shape)),
    ...norms.map(([name, size]) => required(`${layer}.${name}.weight`, [size])),
    ...matrices.flatMap(([name, , size]) => bias(config, biases, layer, name, size)),
  ]
}

function required(name: string, shape: readonly number[]): Weight {
  return { name, shape, need: 'required' }
}

/** Llama's programs take any bias, the others those of attention; Qwen 2 has none on its output. */
function bias(
  { architecture }: ModelConfig,
  biases: ConfigAndWeights['biases'],
  layer: string,
  matrix: string,
  size: number,
): Weight[] {
  const attention = matrix.startsWith('attn_')
  if (!attention && architecture !== 'llama') return []
  if (architecture === 'qwen2' && matrix === 'attn_output') return []
  const need = (attention ? biases.attention : biases.feedForward) ? 'required' : 'optional'
  return [{ name: `${layer}.${matrix}.bias`, shape: [size], need }]
}

/** Types that ggml has for activations, indices and statistics, not for weights. */
const NOT_WEIGHTS: ReadonlySet<GgmlType> = new Set([
  'I8',
  'I16',
  'I32',
  'I64',
  'F64',
  'Q8_1',
  'Q8_K',
])

function checkTensor(tensor: TensorRef, { shape }: Weight, path: string): void {
  const { name } = tensor
  if (shape.join() !== trimmed(tensor.shape).join() && shape.join() !== tensor.shape.join()) {
    const what = `${name} has the shape [${tensor.shape}], but the configuration says [${shape}]`
    throw unsupported(path, what, 'The file is damaged or of another kind: take another one.')
  }
  if (!NOT_WEIGHTS.has(tensor.type)) return
  const what = `${name} is of type ${tensor.type}, which no matrix product takes`
  throw unsupported(path, what, 'Quantize the model again, for example as Q4_K or Q8_0.')
}

/** Some writers pad shapes with ones to two or four dimensions. */
function trimmed(shape: readonly number[]): number[] {
  const kept = [...shape]
  while (kept.length > 1 && kept.at(-1) === 1) kept.pop()
  return kept
}

const SHOWN = 5

function missingTensors(missing: readonly Weight[], path: string, config: ModelConfig) {
  const names = missing.slice(0, SHOWN).map(({ name }) => name)
  const rest = missing.length > SHOWN ? ` and ${missing.length - SHOWN} more` : ''
  const what = `needs tensors that are not there: ${names.join(', ')}${rest}`
  return new LatticeError('model_unsupported', `${path}: ${config.architecture} ${what}.`, {
    todo: 'The file is incomplete or names its tensors otherwise: take another one.',
    details: { tensor: names[0] ?? null, missing: missing.length },
  })
}

function unknownTensor({ name }: TensorRef, path: string, config: ModelConfig) {
  const what = `the tensor ${name} is none that ${config.architecture} takes`
  return new LatticeError('model_unsupported', `${path}: ${what}.`, {
    todo: 'Leaving it out would change results: take a plain model of this family.',
    details: { tensor: name },
  })
}
