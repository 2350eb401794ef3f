// Owns where a model's keys and values lie in the GPU's memory: token by token, all layers of one
// together, in groups of pages that forks share whole.

import { type KvLayout, tokenMajor } from '../../kv/layout.ts'
import type { ModelConfig } from '../../model/model.ts'

/** A fork of this many tokens maps this many frames at most: 25 µs each. */
const FORK_TOKENS = 4096
const FORK_FRAMES = 16

/** Where a model's keys and values (bfloat16) lie in slots of up to `maxTokens` tokens. */
export function gpuKvLayout(config: ModelConfig, maxTokens: number, pageBytes = 2 << 20): KvLayout {
  const rowBytes = 2 * config.kvHeads * config.headDim * Uint16Array.BYTES_PER_ELEMENT
  const forkPages = (FORK_TOKENS * rowBytes * config.layers) / pageBytes
  const shareColumns = 2 ** Math.max(0, Math.ceil(Math.log2(forkPages / FORK_FRAMES)))
  return tokenMajor({ layers: config.layers, rowBytes, maxTokens, pageBytes, shareColumns })
}
