// Owns the Qwen3 family: Llama's block with an RMS norm over each head of q and k before the
// rotation. Qwen3 Technical Report 2025, arXiv:2505.09388.

import type { Model } from '../model.ts'
import { type Program, ProgramBuilder } from '../program.ts'

export function qwen3(model: Pick<Model, 'config' | 'tensors'>): Program {
  const p = new ProgramBuilder(model)
  const { layers, rope, headDim } = p.config
  let x = p.embed('token_embd.weight')
  for (let layer = 0; layer < layers; layer++) {
    const blk = `blk.${layer}`
    const h = p.norm(x, `${blk}.attn_norm.weight`)
    const isLast = layer === layers - 1
    const [q0, k0, v] = p.queryKeyValue(h, blk, isLast)
    const q = p.norm(q0, `${blk}.attn_q_norm.weight`, headDim)
    const k = p.norm(k0, `${blk}.attn_k_norm.weight`, headDim)
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
