// Owns the Llama family: Llama 2 and 3.x, SmolLM2, Mistral. Qwen2 is the same with biases on q, k
// and v, which `linear` adds where the file has them. Touvron et al. 2023, arXiv:2307.09288.

import type { Model } from '../model.ts'
import { type Program, ProgramBuilder } from '../program.ts'

export function llama(model: Pick<Model, 'config' | 'tensors'>): Program {
  const p = new ProgramBuilder(model)
  const { layers, rope } = p.config
  let x = p.embed('token_embd.weight')
  for (let layer = 0; layer < layers; layer++) {
    const blk = `blk.${layer}`
    const h = p.norm(x, `${blk}.attn_norm.weight`)
    const isLast = layer === layers - 1
    const [q, k, v] = p.queryKeyValue(h, blk, isLast)
    p.rope([q, k], rope)
    const attended = p.attention(layer, q, k, v)
    if (isLast) x = p.select(x)
    const [o] = p.linear(attended, `${blk}.attn_output`)
    x = p.add(x, o)
    const f = p.norm(x, `${blk}.ffn_norm.weight`)
    const [gate, up] = p.linear(f, `${blk}.ffn_gate`, `${blk}.ffn_up`)
    const [down] = p.linear(p.glu(gate, up, 'silu'), `${blk}.ffn_down`)
    x = p.add(x, down)
  }
  return p.logits(p.norm(x, 'output_norm.weight'))
}
