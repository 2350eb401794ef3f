// Catches garbage that the engine's loop makes: collecting it would pause every stream. A file of
// its own, so that no other test has taught the compiler other types before.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { getHeapStatistics } from 'node:v8'
import { NullBackend } from '../../src/backends/null/backend.ts'
import { Bench, sequenceRequest, VOCAB } from '../support/null-engine.ts'

const SEQUENCES = 32
const WINDOWS = 10
const WINDOW_STEPS = 500

function allocatedBytes(): number {
  const { total_allocated_bytes: bytes } = getHeapStatistics() as unknown as {
    total_allocated_bytes: number
  }
  return bytes
}

test('a step of 32 decodes allocates more than 2 KiB', (t) => {
  const contextLength = (WINDOWS + 1) * WINDOW_STEPS
  const sizes = { vocab: VOCAB, contextLength, maxSequences: SEQUENCES, stepTokens: 64 }
  const engine = new Bench(new NullBackend(sizes), { maxSequences: SEQUENCES, kvPages: 1e6 })
  for (let id = 0; id < SEQUENCES; id++) {
    engine.submit(id, sequenceRequest({ maxTokens: contextLength - 3 }))
  }
  engine.step()
  for (const { tokens, logprobs } of engine.outcomes.values()) {
    // The test's own lists shall not grow while bytes are counted.
    tokens.push = () => 0
    logprobs.push = () => 0
  }
  const windows = Array.from({ length: WINDOWS }, () => {
    const before = allocatedBytes()
    for (let i = 0; i < WINDOW_STEPS; i++) engine.step()
    return (allocatedBytes() - before) / WINDOW_STEPS
  })
  t.diagnostic(`bytes a step: ${windows.map(Math.round).join(', ')}`)
  // The best: code that is still interpreted boxes every number.
  assert.ok(Math.min(...windows) < 2048)
})
