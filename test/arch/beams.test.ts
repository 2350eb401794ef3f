// Holds the engine's beam search to HF transformers' `generate`: on the same models, the same
// hypotheses in the same order with the same scores.

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { CpuBackend } from '../../src/backends/cpu/backend.ts'
import type { BeamParams } from '../../src/engine/api.ts'
import { Bench, sequenceRequest } from '../support/null-engine.ts'
import { openModel } from '../../src/model/load.ts'

interface Case {
  prompt: number[]
  stopTokens: number[]
  maxTokens: number
  searches: (BeamParams & { hypotheses: { tokens: number[]; score: number }[] })[]
}

/** What tools/goldens/beams.py writes. */
const FOLDER = fileURLToPath(new URL('./goldens/beams', import.meta.url))
const CASES = JSON.parse(readFileSync(join(FOLDER, 'beams.json'), 'utf8')) as Case[]

/** Of a score, or of its size above 1; ours come from keys and values in half precision. */
const TOLERANCE = 1e-3

for (const { prompt, stopTokens, maxTokens, searches } of CASES) {
  test(`other beams than transformers': ${stopTokens.length} stop tokens`, () => {
    const sizes = { contextLength: 64, maxSequences: 16, stepTokens: 160, cpus: [0], pin: false }
    const backend = new CpuBackend(openModel(FOLDER), sizes)
    try {
      const engine = new Bench(backend, { maxSequences: 16, kvPages: 1e6 })
      // Several searches at a time, beside each other.
      const asked = searches.map(({ hypotheses, ...beams }, i) => {
        const ids = hypotheses.map((_, n) => 100 * i + n)
        const request = { prompt: Int32Array.from(prompt), maxTokens, stopTokens, beams }
        engine.submitChoices(ids, sequenceRequest(request), [])
        return { ids, hypotheses, name: JSON.stringify(beams) }
      })
      engine.runAll()
      for (const { ids, hypotheses, name } of asked) {
        hypotheses.forEach(({ tokens, score }, i) => {
          const found = engine.outcome(ids[i]!)
          const stopped = stopTokens.includes(tokens.at(-1)!)
          assert.deepEqual(found.tokens, stopped ? tokens.slice(0, -1) : tokens, `${name} ${i}`)
          assert.equal(found.reason, stopped ? 'stop' : 'length')
          const error = Math.abs(found.score! - score)
          assert.ok(error < TOLERANCE * Math.max(1, Math.abs(score)), `${name} ${i}: ${error}`)
        })
      }
    } finally {
      backend.close()
    }
  })
}
