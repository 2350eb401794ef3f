// Owns the passes over a whole row of logits: where the maximum is and what the exponentials sum
// to. A step makes one or two of these a sequence, so their loop shapes are chosen by measurement.

import { assert } from '../assert.ts'
import { LatticeError } from '../errors.ts'

/**
 * Distances below the row's maximum are counted in 1/16 octaves: weight(a) = 2^(−a/16). So a
 * table of powers at whole a and a short polynomial for the rest make the exponential.
 */
const UNITS_PER_OCTAVE = 16

/** Units in one natural unit of logit: exp(−d) = 2^(−d·UNITS_PER_NAT/16). */
export const UNITS_PER_NAT = UNITS_PER_OCTAVE / Math.LN2

/** Distances beyond this are not made integers: -Infinity's, and those of tiny temperatures. */
const FAR = 2 ** 30

/** Elements whose sum is kept apart, so that inverting the sum looks at one block again. */
const BLOCK = 128

// Taylor terms of exp(f·ln2/16). |f| ≤ 1/2, so |f·ln2/16| < 0.0217 and the first term left out,
// z^5/120, is below 4.1e-11: a relative error far under float32's 6e-8.
const C1 = Math.LN2 / UNITS_PER_OCTAVE
const C2 = C1 ** 2 / 2
const C3 = C1 ** 3 / 6
const C4 = C1 ** 4 / 24

/**
 * The index of the largest logit; the lowest index wins ties.
 *
 * The loop compares 32 logits with the maximum so far, as float32 (hence fround: otherwise each is
 * widened first), and looks closer at the few groups that hold a larger one. Comparing with `!(≤)`
 * rather than `>` lets NaN in at no cost. 21 µs for 49,152 logits, where a plain loop over four
 * accumulators takes 33 and one with an index for each maximum 178; counting groups instead of
 * elements spares an overflow check on each index. Comparing the bits as Int32 takes 19 but
 * overlooks NaNs with the sign bit, which is what x86 produces.
 *
 * @throws LatticeError `backend_failed` for NaN, +Infinity, or a row of nothing but -Infinity.
 */
export function argmax(row: Float32Array): number {
  const groups = row.length >> 5
  let best = -1
  let max = -Infinity
  for (let group = 0; group < groups; group++) {
    const i = group << 5
    const t = Math.fround(max)
    if (
      !(row[i]! <= t) ||
      !(row[i + 1]! <= t) ||
      !(row[i + 2]! <= t) ||
      !(row[i + 3]! <= t) ||
      !(row[i + 4]! <= t) ||
      !(row[i + 5]! <= t) ||
      !(row[i + 6]! <= t) ||
      !(row[i + 7]! <= t) ||
      !(row[i + 8]! <= t) ||
      !(row[i + 9]! <= t) ||
      !(row[i + 10]! <= t) ||
      !(row[i + 11]! <= t) ||
      !(row[i + 12]! <= t) ||
      !(row[i + 13]! <= t) ||
      !(row[i + 14]! <= t) ||
      !(row[i + 15]! <= t) ||
      !(row[i + 16]! <= t) ||
      !(row[i + 17]! <= t) ||
      !(row[i + 18]! <= t) ||
      !(row[i + 19]! <= t) ||
      !(row[i + 20]! <= t) ||
      !(row[i + 21]! <= t) ||
      !(row[i + 22]! <= t) ||
      !(row[i + 23]! <= t) ||
      !(row[i + 24]! <= t) ||
      !(row[i + 25]! <= t) ||
      !(row[i + 26]! <= t) ||
      !(row[i + 27]! <= t) ||
      !(row[i + 28]! <= t) ||
      !(row[i + 29]! <= t) ||
      !(row[i + 30]! <= t) ||
      !(row[i + 31]! <= t)
    ) {
      best = largerIn(row, i, i + 32, best, max)
      max = row[best]!
    }
  }
  best = largerIn(row, groups << 5, row.length, best, max)
  if (best < 0 || row[best] === Infinity) throw unusable(row)
  return best
}

/** The first index of the largest of row[from, to) if it exceeds `max`, else `best`. */
function largerIn(row: Float32Array, from: number, to: number, best: number, max: number): number {
  for (let i = from; i < to; i++) {
    const value = row[i]!
    if (value <= max) continue
    if (value !== value) throw unusable(row)
    best = i
    max = value
  }
  return best
}

/** The error for a row that no token can be chosen from; says what is wrong with it. */
export function unusable(row: Float32Array): LatticeError {
  const nan = row.findIndex(Number.isNaN)
  const infinite = row.indexOf(Infinity)
  const what =
    nan >= 0
      ? `the logit of token ${nan} is not a number`
      : infinite >= 0
        ? `the logit of token ${infinite} is infinite`
        : 'every logit is -Infinity'
  return new LatticeError('backend_failed', `The model cannot choose a next token: ${what}.`, {
    todo: 'Fetch the model again; if its file is whole, this is a bug of the backend.',
  })
}

/**
 * Exponentials of a row's logits, with sums that can be searched. Weights are relative to the
 * row's maximum: weight(a) = 2^(−a/16), where a = (max − logit)·scale.
 *
 * Logits with a ≥ `limit` − ½ count as nothing. The limit lies 53·ln 2 + ln V below the maximum
 * in natural units, so each one left out weighs under 1.05 · 2^−53 / V; there are fewer than V of
 * them, and the maximum itself weighs 1: together they are lost in the rounding of the total.
 */
export class RowWeights {
  readonly limit: number
  readonly #vocab: number
  readonly #powers: Float64Array
  readonly #blocks: Float64Array
  readonly #buckets: Float64Array

  constructor(vocab: number) {
    this.#vocab = vocab
    this.limit = Math.ceil((53 * Math.LN2 + Math.log(vocab)) * UNITS_PER_NAT)
    this.#powers = Float64Array.from({ length: this.limit + 1 }, (_, k) => 2 ** (-k / 16))
    this.#powers[this.limit] = 0
    this.#blocks = new Float64Array(Math.ceil(vocab / BLOCK))
    this.#buckets = new Float64Array(this.limit + 1)
  }

  /** Weight of one logit, at any distance ≥ 0 below the maximum. */
  weight(a: number): number {
    const k = (a + 0.5) | 0
    if (!(a < FAR && k < this.limit)) return Math.exp(-a / UNITS_PER_NAT)
    const f = k - a
    return this.#powers[k]! * (1 + f * (C1 + f * (C2 + f * (C3 + f * C4))))
  }

  /** The weights' total; `locate` may follow. */
  sum(row: Float32Array, max: number, scale: number): number {
    const powers = this.#powers
    const limit = this.limit
    let total = 0
    for (let block = 0, from = 0; from < this.#vocab; block++, from += BLOCK) {
      const to = Math.min(from + BLOCK, this.#vocab)
      let sum = 0
      for (let i = from; i < to; i++) {
        const a = (max - row[i]!) * scale
        if (a < FAR) {
          const k = (a + 0.5) | 0
          const f = k - a
          const over = k - limit
          sum +=
            powers[limit + (over & (over >> 31))]! * (1 + f * (C1 + f * (C2 + f * (C3 + f * C4))))
        }
      }
      this.#blocks[block] = sum
      total += sum
    }
    return total
  }

  /**
   * The first token, by id, at which the running sum of weights exceeds `target`; row, max and
   * scale as `sum` had them. Rounding may leave none: then the last token that weighs anything.
   */
  locate(row: Float32Array, max: number, scale: number, target: number): number {
    let left = target
    let last = -1
    for (let block = 0, from = 0; from < this.#vocab; block++, from += BLOCK) {
      const sum = this.#blocks[block]!
      if (sum === 0) continue
      last = from
      if (left < sum) break
      left -= sum
    }
    assert(last >= 0, 'the maximum weighs 1')
    const to = Math.min(last + BLOCK, this.#vocab)
    let token = last
    for (let i = last; i < to; i++) {
      const a = (max - row[i]!) * scale
      if (!(a + 0.5 < this.limit)) continue
      token = i
      left -= this.weight(a)
      if (left < 0) break
    }
    return token
  }

  /**
   * The distance within which the heaviest logits hold at least `share` of the weights; `total`
   * is left in the field of that name. Weights are gathered in one bucket a unit of distance, so
   * what lies within the answer is at most one bucket more than is needed.
   */
  boundOf(row: Float32Array, max: number, scale: number, share: number): number {
    const buckets = this.#buckets
    const powers = this.#powers
    const limit = this.limit
    buckets.fill(0)
    for (let i = 0; i < this.#vocab; i++) {
      const a = (max - row[i]!) * scale
      if (a < FAR) {
        const k = (a + 0.5) | 0
        const f = k - a
        const over = k - limit
        buckets[limit + (over & (over >> 31))]! += 1 + f * (C1 + f * (C2 + f * (C3 + f * C4)))
      }
    }
    let total = 0
    for (let k = 0; k <= limit; k++) total += buckets[k]! * powers[k]!
    this.total = total
    // The margin is for sums in another order later: a bucket too many is only slower.
    const target = total * share * (1 + 1e-9)
    let sum = 0
    for (let k = 0; k < limit; k++) {
      sum += buckets[k]! * powers[k]!
      if (sum >= target) return k + 0.5
    }
    return limit
  }

  /** Of the last `boundOf`. */
  total = 0
}
