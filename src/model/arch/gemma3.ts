// Owns the Gemma 3 family: norms before and after each half of a block, head norms on q and k,
// five sliding-window layers for each global one, GELU. Gemma 3 Report 2025, arXiv:2503.19786.

import { present } from '../../assert.ts'
import type { Model } from '../model.ts'
import { type Program, ProgramBuilder } from '../program.ts'

export function gemma3(model: Pick<Model, 'config' | 'tensors'>): Program {
  const p = new ProgramBuilder(model)
  const { layers, rope, headDim, slidingWindow } = p.config
  let x = p.embed('token_embd.weight')
  for (let layer = 0; layer < layers; layer++) {
    const blk = `blk.${layer}`
    const h = p.norm(x, `${blk}.attn_norm.weight`)
    const isLast = layer === layers - 1
    const [q0, k0, v] = p.queryKeyValue(h, blk, isLast)
    const q = p.norm(q0, `${blk}.attn_q_norm.weight`, headDim)
    const k = p.norm(k0, `${blk}.attn_k_norm.weight`, headDim)
    const local = slidingWindow?.layers[layer] ?? false
    p.rope([q, k], local ? present(p.config.ropeLocal, 'local rope') : rope)
    const attended = p.attention(layer, q, k, v)
    if (isLast) x = p.select(x)
    const [o] = p.linear(attended, `${blk}.attn_output`)
    x = p.add(x, p.norm(o, `${blk}.post_attention_norm.weight`))
    const f = p.norm(x, `${blk}.ffn_norm.weight`)
    const [gate, up] = p.linear(f, `${blk}.ffn_gate`, `${blk}.ffn_up`)
    const [down] = p.linear(p.glu(gate, up, 'gelu'), `${blk}.ffn_down`)
    x = p.add(x, p.norm(down, `${blk}.post_ffw_norm.weight`))
  }
  return p.logits(p.norm(x, 'output_norm.weight'))
}
