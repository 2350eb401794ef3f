// Every tensor type of a GGUF file, multiplied by every build of the CPU library that runs here.

import assert from 'node:assert/strict'
import { fork } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import { test } from 'node:test'
import { TYPES, typedError, typedModel } from './typed-model.ts'
import { rankVariants } from '../../src/backends/cpu/variant.ts'
import { LatticeError } from '../../src/errors.ts'
import { GGML_TYPES, type GgmlType } from '../../src/model/ggml-types.ts'

const WORKER = fileURLToPath(new URL('types-worker.ts', import.meta.url))

/**
 * Rounding that the reference does not do: of keys and values, and of what it does to inputs that
 * lie between two steps of their 8-bit blocks. Rows in the wrong order cost 0.1 and more.
 */
const TOLERANCE: Readonly<Record<string, number>> = { F32: 5e-3, F16: 5e-3, BF16: 1.5e-2 }
const TOLERANCE_QUANTIZED = 4e-2

for (const { name, usable } of rankVariants()) {
  const skip = !usable && 'this processor lacks its instructions'
  test(`a tensor type that the build ${name} multiplies wrongly`, { skip }, async (t) => {
    const worker = fork(WORKER, [name])
    const [results] = (await Promise.race([
      once(worker, 'message'),
      once(worker, 'exit').then(([code, signal]) => assert.fail(`ended with ${code ?? signal}`)),
    ])) as [Record<string, { error: number; layouts: string }>]
    for (const [type, { error }] of Object.entries(results)) {
      const tolerance = TOLERANCE[type] ?? TOLERANCE_QUANTIZED
      assert.ok(error <= tolerance, `${name}, ${type}: relative error ${error}`)
    }
    assert.deepEqual(Object.keys(results), TYPES)
    const layouts = Object.entries(results).map(([type, one]) => `${type} ${one.layouts || '-'}`)
    t.diagnostic(layouts.join(', '))
  })
}

test('a type that crashes the library or that no test knows', () => {
  const known = new Set(TYPES)
  const others = (Object.keys(GGML_TYPES) as GgmlType[]).filter((type) => !known.has(type))
  assert.deepEqual(others, ['Q8_1', 'Q8_K', 'I8', 'I16', 'I32', 'I64', 'F64'])
  for (const type of others) {
    for (const tensor of ['blk.0.attn_k.weight', 'token_embd.weight', 'output_norm.weight']) {
      refused(typedModel('F32', { [tensor]: type }), type)
    }
  }
})

test('a norm of a type that no vector may have', () => {
  for (const type of TYPES.filter((one) => one !== 'Q4_K_M') as GgmlType[]) {
    const model = typedModel('F32', { 'blk.0.ffn_norm.weight': type })
    if (['F32', 'F16', 'BF16'].includes(type)) typedError(model)
    else refused(model, type)
  }
})

function refused(model: ReturnType<typeof typedModel>, type: string): void {
  assert.throws(
    () => typedError(model),
    (error) => error instanceof LatticeError && error.code === 'model_unsupported',
    type,
  )
}
