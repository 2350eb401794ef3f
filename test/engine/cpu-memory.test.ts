// Catches compute that touches KV memory outside what the engine has accounted for: a read of a
// masked position makes the kernel give a page just as a write does.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { CHUNK_TOKENS_MIN, CpuBackend } from '../../src/backends/cpu/backend.ts'
import { allowedCpus } from '../../src/ffi/libc.ts'
import { openModel } from '../../src/model/load.ts'
import { stepTokensNeeded } from '../../src/scheduler/scheduler.ts'
import { Bench, sequenceRequest } from '../support/null-engine.ts'
import { Random } from '../support/random.ts'
import { TINY_LLAMA, tinyLlama, writeTinyGguf } from '../support/tiny-gguf.ts'

const SEQUENCES = 8
const seed = 17

function cpuBackend(): CpuBackend {
  return new CpuBackend(openModel(writeTinyGguf(tinyLlama())), {
    contextLength: TINY_LLAMA.contextLength,
    maxSequences: SEQUENCES,
    stepTokens: stepTokensNeeded(SEQUENCES, CHUNK_TOKENS_MIN),
    cpus: allowedCpus().slice(0, 1),
    pin: false,
  })
}

function requests() {
  const random = new Random(seed)
  return Array.from({ length: 24 }, () => {
    const prompt = Int32Array.from({ length: 1 + random.below(300) }, () =>
      random.below(TINY_LLAMA.vocab),
    )
    return sequenceRequest({ prompt, maxTokens: 1 + random.below(150) })
  })
}

test(`attention touches pages that nobody accounted for (seed ${seed})`, () => {
  const backend = cpuBackend()
  // Tight enough for preemption: the 8 together would need about 120.
  const engine = new Bench(backend, { maxSequences: SEQUENCES, kvPages: 50, greedy: true })
  requests().forEach((request, id) => engine.submit(id, request))
  while (engine.step()) {
    const { usedPages, limitPages, pageBytes, residentBytes } = engine.core.snapshot().kv
    assert.ok(usedPages <= limitPages)
    const used = usedPages * pageBytes
    assert.ok(residentBytes <= used, `${residentBytes} bytes are resident, ${used} accounted for`)
  }
  const { finished, preemptions } = engine.core.snapshot()
  assert.equal(finished.length, 24)
  assert.ok(preemptions > 0, 'the limit was never felt')
  engine.settle()
  assert.equal(backend.kv.residentBytes(), 0)
  backend.close()
})

test(`a sequence's tokens change when it is preempted or batched (seed ${seed})`, () => {
  const run = (maxSequences: number, kvPages: number) => {
    const backend = cpuBackend()
    const engine = new Bench(backend, { maxSequences, kvPages, greedy: true })
    requests().forEach((request, id) => engine.submit(id, request))
    engine.runAll()
    const { preemptions } = engine.core.snapshot()
    backend.close()
    return { engine, preemptions }
  }
  const alone = run(1, 1000)
  const crowded = run(SEQUENCES, 50)
  assert.equal(alone.preemptions, 0)
  assert.ok(crowded.preemptions > 0)
  // Kernels for one row and for many may round differently, and a tie then falls otherwise.
  const changed = [...alone.engine.outcomes].filter(
    ([id, { tokens }]) => String(crowded.engine.outcome(id).tokens) !== String(tokens),
  )
  assert.ok(changed.length <= 2, `sequences ${changed.map(([id]) => id)}`)
})
