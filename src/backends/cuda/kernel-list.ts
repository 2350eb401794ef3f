// Owns the list of kernels that a model needs on a GPU, known before anything of it is loaded, so
// that they are compiled at once. What is missing here is compiled when it is first used.

import { present } from '../../assert.ts'
import type { GpuDevice } from '../../ffi/cuda.ts'
import { programFor } from '../../model/arch/programs.ts'
import type { Model } from '../../model/model.ts'
import { attentionVariants } from './attention-variants.ts'
import { fuse, fuseSkinny, type Node, type SkinnyNode } from './fuse.ts'
import type { KernelSource } from './module-cache.ts'
import { SKINNY_TOKENS, skinnyVariant } from './skinny.ts'

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
export function kernelsOf(model: Model, info: GpuDevice, releaseRounds: number): KernelSource[] {
  const program = programFor(model)
  const { heads, kvHeads, headDim, attentionScale: scale } = program.config
  const { capability, sharedBytesPerBlock } = info
  const shape = { heads, kvHeads, headDim, scale }
  const { decode, prefill } = attentionVariants(shape, capability, sharedBytesPerBlock)
  const nodes = [fuse(program, true), fuse(program, false)]
  const files = new Set(ALWAYS)
  for (const node of nodes.flat()) {
    const file = FILES[node.kind]
    if (file !== undefined) files.add(file)
    if (node.kind === 'linear' && node.biases.some((bias) => bias !== undefined)) {
      files.add('rows.cu')
    }
  }
  const products = nodes
    .flatMap((of) => fuseSkinny(of))
    .filter((node) => node.kind === 'skinny')
    .flatMap((node) => variantsOf(node, model, releaseRounds))
  // The longest to compile come first: nobody waits for one that began last.
  const list = [prefill, decode, ...products, ...[...files].map((file) => ({ file, defines: {} }))]
  return [...new Map(list.map((one) => [keyOf(one), sourceOf(one)])).values()]
}

function variantsOf(node: SkinnyNode, model: Model, releaseRounds: number): KernelSource[] {
  const { linear } = node
  const name = present(linear.kind === 'logits' ? linear.weight : linear.weights[0], 'a weight')
  const k = present(model.tensors.get(name)?.shape[0], `tensor ${name}`)
  return SKINNY_TOKENS.flatMap((tokens) => {
    const variant = skinnyVariant(node, k, tokens, releaseRounds)
    return variant ? [{ file: 'gemv.cu', defines: variant.defines }] : []
  })
}

function sourceOf({ file, defines = {} }: KernelSource): KernelSource {
  return { file, defines }
}

export function keyOf({ file, defines = {} }: KernelSource): string {
  return `${file} ${JSON.stringify(defines)}`
}
