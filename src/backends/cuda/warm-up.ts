// Owns the first steps, before anybody asks for one: whatever a driver or library does only when it
// first runs something, happens at the start.

import { GREEDY } from '../../engine/api.ts'
import { columnsFor } from '../../kv/regions.ts'
import { type KvMemory, StepBatch, type TokenChooser } from '../backend.ts'

const PROMPT_TOKENS = 16

/** A backend that nobody uses yet. */
export interface Cold extends TokenChooser {
  readonly kv: KvMemory
}

/** A short prompt and two tokens after it, in slot 0; memory is as it was afterwards. */
export function warmUp(backend: Cold): void {
  const { kv } = backend
  const count = Math.min(PROMPT_TOKENS, kv.layout.shape.maxTokens - 2)
  if (count < 2) return
  const prompt = new Int32Array(count)
  const columns = columnsFor(kv.layout, count + 2)
  kv.grow?.(0, 0, columns)
  const batch = new StepBatch(count, 1)
  backend.begin(0, { params: GREEDY, prompt, output: new Int32Array() })
  batch.add(0, 0, prompt, 0, count, true)
  backend.tokensOf(backend.launchChoosing(batch, false))
  for (const position of [count, count + 1]) {
    batch.clear()
    batch.add(0, position, [-1], 0, 1, true)
    backend.tokensOf(backend.launchChoosing(batch, false))
  }
  kv.discard(0, 0, columns)
}
