// Owns the list of kernels that a model needs on a GPU, known before anything of it is loaded, so
// that they are compiled at once. What is missing here is compiled when it is first used.

import { present } from '../../assert.ts'
import type { GpuDevice } from '../../ffi/cuda.ts'
import { programFor } from '../../model/arch/programs.ts'
import type { Model } from '../../model/model.ts'
import { attentionVariants } from './attention-variants.ts'
import { batchVariant, columnsUpTo, planBatch } from './batch-plan.ts'
import { BUCKETS } from './buckets.ts'
import { planStep, stepShape, stepVariant } from './decode-step.ts'
import type { Quantization } from './quantization.ts'
import { e4m3Weights } from './e4m3.ts'
import { HOPPER } from './forward.ts'
import { fuse, fuseSkinny, type Node, type SkinnyNode } from './fuse.ts'
import { GEMV_TOKENS_MAX } from './gemv.ts'
import { CANDIDATES, isSmall, variantsOf as hopperVariantsOf } from './hopper-launch.ts'
import { HOPPER_TOKENS_MAX } from './hopper-products.ts'
import { paddedRows } from './matmul.ts'
import type { KernelSource } from './module-cache.ts'
import { fewOfE4m3, SKINNY_TOKENS, skinnyVariant } from './skinny.ts'

/** The file of each kind of node; products of few tokens have one for each shape. */
const FILES: Readonly<Partial<Record<Node['kind'], string>>> = {
  embed: 'embed.cu',
  norm: 'norm.cu',
  rope: 'rope-append.cu',
  glu: 'glu.cu',
  select: 'rows.cu',
  add: 'rows.cu',
}

/** Steps begin and end with these, and choose tokens. */
const ALWAYS = ['step.cu', 'sample.cu']

/** @throws LatticeError `model_unsupported` for heads that no kernel takes */
export function kernelsOf(
  model: Model,
  info: GpuDevice,
  releaseRounds: number,
  maxSequences: number,
  quantization?: Quantization,
): KernelSource[] {
  const program = programFor(model)
  const { heads, kvHeads, headDim, attentionScale: scale } = program.config
  const { capability, sharedBytesPerBlock } = info
  const shape = { heads, kvHeads, headDim, scale }
  const { decode, prefill } = attentionVariants(shape, capability, sharedBytesPerBlock)
  const nodes = [fuse(program, true), fuse(program, false)]
  const files = new Set(ALWAYS)
  if (quantization) files.add('quantise.cu')
  for (const node of nodes.flat()) {
    const file = FILES[node.kind]
    if (file !== undefined) files.add(file)
    if (node.kind === 'linear' && node.biases.some((bias) => bias !== undefined)) {
      files.add('rows.cu')
    }
  }
  const narrow = quantization ? e4m3Weights(model, info) : new Set<string>()
  const products = nodes.flatMap((of) => productsOf(fuseSkinny(of), model, narrow, releaseRounds))
  const own = quantization ? [] : nodes
  const [decoding = []] = own
  const steps = wholeSteps(decoding, model, info, maxSequences)
  const batches = batchSteps(nodes[0] ?? [], model, narrow, info, maxSequences)
  const tiles = hopperTiles(own, model, info, maxSequences)
  // The longest to compile come first: nobody waits for one that began last.
  const list = [
    ...batches,
    ...steps,
    prefill,
    decode,
    ...tiles,
    ...products,
    ...[...files].map((file) => ({ file, defines: {} })),
  ]
  return [...new Map(list.map((one) => [keyOf(one), sourceOf(one)])).values()]
}

/** Decode steps of few tokens as one kernel, where a model allows that. */
function wholeSteps(
  nodes: readonly Node[],
  model: Model,
  { multiprocessors, sharedBytesPerBlock }: GpuDevice,
  maxSequences: number,
): KernelSource[] {
  const plan = planStep(fuseSkinny(nodes))
  if ('reason' in plan) return []
  const shape = stepShape(plan, programFor(model).config, (names) => matrixOf(model, names).k)
  return SKINNY_TOKENS.filter((tokens) => tokens <= maxSequences).flatMap((tokens) => {
    const variant = stepVariant(shape, tokens, multiprocessors, sharedBytesPerBlock)
    return 'reason' in variant ? [] : [{ file: 'decode-step.cu', defines: variant.defines }]
  })
}

/** Decode steps of more tokens as one kernel, where a model and the GPU allow that. */
function batchSteps(
  nodes: readonly Node[],
  model: Model,
  narrow: ReadonlySet<string>,
  { capability, multiprocessors, sharedBytesPerBlock: room }: GpuDevice,
  maxSequences: number,
): KernelSource[] {
  const phases = planStep(fuseSkinny(nodes))
  if (capability !== HOPPER || 'reason' in phases) return []
  const { config } = programFor(model)
  const matrix = (names: readonly string[]) => {
    return { ...matrixOf(model, names), e4m3: names.every((name) => narrow.has(name)) }
  }
  const plan = planBatch(phases, config, matrix, multiprocessors)
  if ('reason' in plan) return []
  return columnsUpTo(maxSequences).flatMap((tokens) => {
    const variant = batchVariant(plan, config, tokens, multiprocessors, room)
    return 'reason' in variant ? [] : [{ file: 'batch-step.cu', defines: variant.defines }]
  })
}

/** What products of more tokens are measured with. */
function hopperTiles(
  nodes: readonly (readonly Node[])[],
  model: Model,
  { capability, multiprocessors, sharedBytesPerBlock: room }: GpuDevice,
  maxSequences: number,
): KernelSource[] {
  if (capability !== HOPPER) return []
  const { headDim } = programFor(model).config
  const products = nodes
    .flatMap((of) => fuseSkinny(of, false))
    .filter((node) => node.kind === 'skinny')
    .map((node) => ({ node, matrix: matrixOf(model, weightsOf(node)) }))
    .filter(({ matrix }) => !isSmall(matrix))
  const rows = paddedRows(maxSequences)
  const counts = BUCKETS.filter((b) => b > GEMV_TOKENS_MAX && b <= HOPPER_TOKENS_MAX && b <= rows)
  return counts.flatMap((tokens) =>
    products
      .flatMap(({ node, matrix }) =>
        hopperVariantsOf(node, matrix, headDim, tokens, multiprocessors, room).slice(0, CANDIDATES),
      )
      .map(({ defines }) => ({ file: 'skinny-hopper.cu', defines })),
  )
}

function weightsOf({ linear }: SkinnyNode): readonly string[] {
  return linear.kind === 'logits' ? [linear.weight] : linear.weights
}

/** Matrices side by side. */
function matrixOf(model: Model, names: readonly string[]): { rows: number; k: number } {
  const shapes = names.map((name) => present(model.tensors.get(name)?.shape, `tensor ${name}`))
  const rows = shapes.reduce((sum, [, count = 0]) => sum + count, 0)
  return { rows, k: present(shapes[0]?.[0], 'a row') }
}

/** Products of 1–4 tokens. */
function productsOf(
  nodes: readonly (Node | SkinnyNode)[],
  model: Model,
  narrow: ReadonlySet<string>,
  releaseRounds: number,
): KernelSource[] {
  const of = (names: readonly string[]) => {
    return { k: matrixOf(model, names).k, e4m3: names.every((name) => narrow.has(name)) }
  }
  const skinny = nodes.filter((node) => node.kind === 'skinny')
  return SKINNY_TOKENS.filter((tokens) => fewOfE4m3(nodes, tokens, of)).flatMap((tokens) =>
    skinny.flatMap((node) => {
      const { k, e4m3 } = of(weightsOf(node))
      const variant = skinnyVariant(node, k, tokens, releaseRounds, e4m3)
      return variant ? [{ file: 'gemv.cu', defines: variant.defines }] : []
    }),
  )
}

function sourceOf({ file, defines = {} }: KernelSource): KernelSource {
  return { file, defines }
}

export function keyOf({ file, defines = {} }: KernelSource): string {
  return `${file} ${JSON.stringify(defines)}`
}
