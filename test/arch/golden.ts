// Owns the golden logits of the tiny models in goldens/: how they are read, and how a row of ours
// is compared with what transformers computed at the same position of the same tokens.

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { openModel } from '../../src/model/load.ts'
import type { Model } from '../../src/model/model.ts'

/** Every model that tools/goldens/arch_families.py writes. */
export const FAMILIES = [
  ...['llama2', 'llama3', 'llama-biased', 'mistral', 'qwen2', 'qwen3', 'qwen3-yarn'],
  ...['gemma3', 'gemma3-scaled'],
] as const

/**
 * Root mean square of a row's error over that of the row. Queries, keys and values are rounded to
 * 11 bits, and inputs of products with BF16 weights to 8. A wrong mask, angle or scale costs 0.05
 * and more (`mutants.test.ts`).
 */
const TOLERANCE = { F32: 1e-2, F16: 1e-2, BF16: 3e-2 } as const

export interface GoldenSequence {
  tokens: readonly number[]
  argmax: readonly number[]
  gap: Float32Array
  rms: Float32Array
  /** Logits of `Golden.columns`, position after position. */
  sampled: Float32Array
  /** Whole rows, by position. */
  whole: ReadonlyMap<number, Float32Array>
}

interface GoldenJson {
  vocab: number
  columns: number[]
  sequences: {
    tokens: number[]
    argmax: number[]
    gap: string
    rms: string
    sampled: string
    wholePositions: number[]
    whole: string
  }[]
}

export class Golden {
  readonly family: string
  readonly model: Model
  /** The largest error that rounding explains. */
  readonly tolerance: number
  readonly sequences: readonly GoldenSequence[]
  private readonly columns: readonly number[]

  constructor(family: string) {
    this.family = family
    this.model = openModel(folder(family))
    const type = this.model.tensors.get('token_embd.weight')?.type
    assert.ok(type === 'F32' || type === 'F16' || type === 'BF16', 'the golden models are floats')
    this.tolerance = TOLERANCE[type]
    const json = JSON.parse(readFileSync(join(folder(family), 'golden.json'), 'utf8')) as GoldenJson
    this.columns = json.columns
    this.sequences = json.sequences.map(({ tokens, argmax, wholePositions, ...packed }) => {
      const rows = floats(packed.whole)
      const whole = wholePositions.map((position, i): [number, Float32Array] => [
        position,
        rows.subarray(i * json.vocab, (i + 1) * json.vocab),
      ])
      return {
        tokens,
        argmax,
        gap: floats(packed.gap),
        rms: floats(packed.rms),
        sampled: floats(packed.sampled),
        whole: new Map(whole),
      }
    })
  }

  /** The relative error of a row of logits; NaN if the row has one. */
  error(sequence: number, position: number, row: Float32Array): number {
    const golden = this.sequence(sequence)
    const whole = golden.whole.get(position)
    const stride = this.columns.length
    const squares = whole
      ? Array.from(whole, (value, i) => ((row[i] ?? NaN) - value) ** 2)
      : this.columns.map(
          (column, i) => ((row[column] ?? NaN) - golden.sampled[position * stride + i]!) ** 2,
        )
    const mean = squares.reduce((sum, square) => sum + square, 0) / squares.length
    return Math.sqrt(mean) / golden.rms[position]!
  }

  /** Fails unless the row agrees: small error, and the same most likely token. */
  check(sequence: number, position: number, row: Float32Array): number {
    const error = this.error(sequence, position, row)
    const tolerance = this.tolerance
    const at = `${this.family}, sequence ${sequence}, position ${position}`
    assert.ok(error <= tolerance, `${at}: relative error ${error}`)
    const { argmax, gap, rms } = this.sequence(sequence)
    // Where the two best are nearly equal, rounding may choose.
    if (gap[position]! > 5 * tolerance * rms[position]!) {
      assert.equal(largest(row), argmax[position], `${at}: most likely token`)
    }
    return error
  }

  sequence(index: number): GoldenSequence {
    const sequence = this.sequences[index]
    assert.ok(sequence, `${this.family} has a sequence ${index}`)
    return sequence
  }
}

function folder(family: string): string {
  return join(import.meta.dirname, 'goldens', family)
}

function floats(base64: string): Float32Array {
  const bytes = Buffer.from(base64, 'base64')
  return new Float32Array(new Uint8Array(bytes).buffer)
}

function largest(row: Float32Array): number {
  let best = 0
  for (let i = 1; i < row.length; i++) if (row[i]! > row[best]!) best = i
  return best
}
