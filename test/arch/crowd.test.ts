// Catches weights whose products depend on how many sequences share a step: which types of tensors
// keep the promise of docs/decisions/0004, and how far the others are from it.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { StepBatch } from '../../src/backends/backend.ts'
import { CpuBackend } from '../../src/backends/cpu/backend.ts'
import { describeCpu } from '../../src/backends/cpu/variant.ts'
import { openModel } from '../../src/model/load.ts'
import { type TypedModel, TYPES, typedModel } from './typed-model.ts'

const UNQUANTISED = ['BF16', 'F16', 'F32']
const QUANTISED = ['MXFP4', 'NVFP4', 'Q1_0', 'Q2_0', 'Q3_K', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q5_K']
const ALSO = ['Q6_K', 'Q8_0', 'TQ1_0', 'TQ2_0']
const HOLDS = [...UNQUANTISED, ...QUANTISED, ...ALSO]
/** Of some, one row is multiplied otherwise than four or nine: on some builds or on all. */
const NEARLY = ['IQ1_M', 'IQ1_S', 'IQ2_S', 'IQ2_XS', 'IQ2_XXS', 'IQ3_S', 'IQ3_XXS', 'IQ4_NL']
const NEARLY_K = ['IQ4_XS', 'Q2_K', 'Q4_K', 'Q4_K_M']
/** Of logits between −8 and 8. */
const NEARLY_WITHIN = 1e-4

const STEPS = 5

const { features } = describeCpu()
const skip = !features.includes('avx2') && 'kernels for older processors do otherwise'

test('the bits of a sequence depend on how many others share its steps', { skip }, (t) => {
  assert.deepEqual([...HOLDS, ...NEARLY, ...NEARLY_K].toSorted(), TYPES.toSorted())
  const found = TYPES.map((type) => [type, worstDifference(typedModel(type))] as const)
  for (const [type, difference] of found) {
    if (HOLDS.includes(type)) assert.equal(difference, 0, type)
    else assert.ok(difference < NEARLY_WITHIN, `${type}: ${difference}`)
  }
  const nearly = found.filter(([, difference]) => difference > 0)
  t.diagnostic(nearly.map(([type, difference]) => `${type} ${difference}`).join(', '))
})

/** Between the logits of a sequence alone and among others, over prompts of several lengths. */
function worstDifference({ path, tokens }: TypedModel): number {
  const backend = new CpuBackend(openModel(path), {
    contextLength: 64,
    maxSequences: 9,
    stepTokens: 90,
    cpus: [0],
    pin: false,
  })
  const batch = new StepBatch(90, 9)
  const run = (others: number, promptTokens: number): number[] => {
    const logits: number[] = []
    for (let step = 0, at = 0; step < STEPS; step++) {
      const count = step === 0 ? promptTokens : 1
      batch.clear()
      for (let slot = 0; slot <= others; slot++) {
        batch.add(
          slot,
          at,
          tokens.map((token, i) => (token + i * slot) % 287),
          at,
          count,
          true,
        )
      }
      at += count
      backend.launch(batch)
      logits.push(...backend.collect()[0]!)
    }
    return logits
  }
  try {
    let difference = 0
    for (const promptTokens of [1, 9]) {
      const alone = run(0, promptTokens)
      for (const others of [1, 3, 8]) {
        const among = run(others, promptTokens)
        alone.forEach((logit, i) => {
          difference = Math.max(difference, Math.abs(logit - among[i]!))
        })
      }
    }
    return difference
  } finally {
    backend.close()
  }
}
