// Owns which products of a model are of e4m3, numbers of 8 bits, and what of their surroundings
// quantises and scales for them. Pure: it knows no device.

import { present } from '../../assert.ts'
import { LatticeError } from '../../errors.ts'
import { programFor } from '../../model/arch/programs.ts'
import type { Model } from '../../model/model.ts'
import { whyNotFp8 } from './quantization.ts'
import { fuse, type LinearNode, type Node, single } from './fuse.ts'

/** The matrix library wants rows and columns of e4m3 to be multiples of this. */
const MULTIPLE = 16
/** Elements of a row that the kernels' blocks hold. */
const WIDTH_MAX = 32_768

/**
 * The matrices that are e4m3: those of products within blocks whose shapes allow it. The embedding
 * and the logits' matrix are bf16.
 * @throws LatticeError `backend_unavailable` for a GPU that cannot multiply them,
 *   `model_unsupported` if there are none
 */
export function e4m3Weights(
  model: Model,
  gpu: { name: string; capability: number },
): ReadonlySet<string> {
  const problem = whyNotFp8(gpu)
  if (problem !== undefined) {
    throw new LatticeError('backend_unavailable', `${gpu.name} has no fp8: ${problem}.`, {
      todo: 'Leave out --quantization: weights are bfloat16 then.',
    })
  }
  const names = fuse(programFor(model), true).flatMap((node) => {
    if (node.kind !== 'linear') return []
    const shapes = node.weights.map((name) => present(model.tensors.get(name)?.shape, name))
    const fits = shapes.every(
      ([k = 0, rows = 0]) => k % MULTIPLE === 0 && rows % MULTIPLE === 0 && k <= WIDTH_MAX,
    )
    return fits ? node.weights : []
  })
  if (names.length === 0) {
    throw new LatticeError('model_unsupported', 'No matrix of this model can be fp8.', {
      todo: 'Leave out --quantization: fp8 takes sizes that are multiples of 16.',
    })
  }
  return new Set(names)
}

export interface E4m3Plan {
  products: ReadonlySet<LinearNode>
  /** By product, the norm or activation that makes its input as e4m3; else a kernel between. */
  narrowing: ReadonlyMap<LinearNode, Node>
  /** By product, the node that scales it as it reads it; else a kernel of its own does. */
  scaling: ReadonlyMap<LinearNode, Node>
}

/** @param names of the matrices that are e4m3 */
export function planE4m3(nodes: readonly Node[], names: ReadonlySet<string>): E4m3Plan {
  const products = new Set<LinearNode>()
  const narrowing = new Map<LinearNode, Node>()
  const scaling = new Map<LinearNode, Node>()
  nodes.forEach((node, i) => {
    if (node.kind !== 'linear' || !node.weights.every((name) => names.has(name))) return
    products.add(node)
    const before = nodes[i - 1]
    const makes = (before?.kind === 'norm' || before?.kind === 'glu') && before.out === node.in
    if (makes && single(nodes, node.in)) narrowing.set(node, before)
    const after = nodes[i + 1]
    const plain = node.biases.every((bias) => bias === undefined)
    if (after && plain && scales(after, node)) scaling.set(node, after)
  })
  return { products, narrowing, scaling }
}

/** Whether a node can take a product's sums as they come from the tensor cores. */
function scales(node: Node, { outs, accumulate, rows }: LinearNode): boolean {
  switch (node.kind) {
    case 'rope':
      return outs.join() === [node.q?.value, node.k?.value, node.v].join()
    case 'glu':
      return outs.join() === [node.gate, node.up].join()
    case 'norm':
      // What would be added to a sum is added by the norm after it.
      if (accumulate) return node.x === outs[0] && node.added === undefined && node.rows === rows
      return node.added === outs[0]
    default:
      return false
  }
}
