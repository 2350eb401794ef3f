// Owns the tokens that filters have left in the running for one draw: gathers them from a row,
// narrows them, picks one. Candidates stay in the order of their ids, which the draw relies on.

import { assert } from '../assert.ts'
import { type RowWeights, unusable } from './sampler-rows.ts'

/** Candidates at which the top-k scan first raises its threshold, at least. */
const FIRST_CUT = 128

/** The lowest finite float32: a threshold that only -Infinity fails. */
const LOWEST = -3.4028234663852886e38

/**
 * The candidates and their scratch, all of the vocabulary's length because a filter may keep
 * everything. `distance` is max − logit in units (see sampler-rows), `weight` its exponential.
 */
export class Candidates {
  count = 0
  readonly ids: Int32Array
  readonly logits: Float32Array
  readonly weight: Float64Array
  readonly #distance: Float64Array
  readonly #rows: RowWeights
  /** What `#select` permutes. */
  readonly #keys: Float64Array
  readonly #masses: Float64Array
  readonly #buckets: Float64Array
  /** Answers of `#select`: the boundary key and the mass still needed of those equal to it. */
  #cut = 0
  #needed = 0
  #dice = 0

  constructor(vocab: number, rows: RowWeights) {
    this.#rows = rows
    this.ids = new Int32Array(vocab)
    this.logits = new Float32Array(vocab)
    this.weight = new Float64Array(vocab)
    this.#distance = new Float64Array(vocab)
    this.#keys = new Float64Array(vocab)
    this.#masses = new Float64Array(vocab)
    this.#buckets = new Float64Array(rows.limit + 1)
  }

  /**
   * Takes every finite logit not below the k-th largest; ties with it all stay, as in HF's
   * TopKLogitsWarper. Those not below a rising threshold are collected; whenever they have
   * doubled, the k-th largest of them becomes the threshold, so most logits cost one compare.
   *
   * @throws LatticeError `backend_failed` for NaN, +Infinity, or a row of nothing but -Infinity.
   */
  takeTop(row: Float32Array, k: number): void {
    const groups = row.length >> 3
    let full = Math.max(FIRST_CUT, 4 * k)
    let threshold = LOWEST
    this.count = 0
    for (let group = 0; group <= groups; group++) {
      const i = group << 3
      const t = Math.fround(threshold)
      if (
        group < groups &&
        row[i]! < t &&
        row[i + 1]! < t &&
        row[i + 2]! < t &&
        row[i + 3]! < t &&
        row[i + 4]! < t &&
        row[i + 5]! < t &&
        row[i + 6]! < t &&
        row[i + 7]! < t
      ) {
        continue
      }
      this.#takeFrom(row, i, Math.min(i + 8, row.length), t)
      if (this.count < full) continue
      threshold = this.#keepTop(k)
      full = Math.max(FIRST_CUT, 2 * this.count)
    }
    if (this.count > k) this.#keepTop(k)
    if (this.count === 0 || this.#largest() === Infinity) throw unusable(row)
  }

  #largest(): number {
    let max = -Infinity
    for (let i = 0; i < this.count; i++) max = Math.max(max, this.logits[i]!)
    return max
  }

  #takeFrom(row: Float32Array, from: number, to: number, threshold: number): void {
    for (let i = from; i < to; i++) {
      const value = row[i]!
      if (value < threshold) continue
      if (value !== value) throw unusable(row)
      this.ids[this.count] = i
      this.logits[this.count] = value
      this.count += 1
    }
  }

  /** Drops logits below the k-th largest, which it returns. */
  #keepTop(k: number): number {
    for (let i = 0; i < this.count; i++) this.#keys[i] = -this.logits[i]!
    this.#masses.fill(1, 0, this.count)
    this.#select(this.count, k)
    const kth = -this.#cut
    let kept = 0
    for (let i = 0; i < this.count; i++) {
      if (this.logits[i]! < kth) continue
      this.ids[kept] = this.ids[i]!
      this.logits[kept] = this.logits[i]!
      kept += 1
    }
    this.count = kept
    return kth
  }

  /** Weighs what `takeTop` took; `scale` is units per logit. */
  weigh(scale: number): void {
    const max = this.#largest()
    for (let i = 0; i < this.count; i++) this.#distance[i] = (max - this.logits[i]!) * scale
    this.#weighAll()
  }

  /** Takes and weighs every logit whose distance from `max` is under `bound` units. */
  takeNear(row: Float32Array, max: number, scale: number, bound: number): void {
    const groups = row.length >> 3
    // Rounded towards taking too much; the exact comparison follows.
    const lowest = max - bound / scale
    const t = Math.fround(lowest - Math.abs(lowest) * 1e-6 - 1e-30)
    const ids = this.ids
    const distance = this.#distance
    let count = 0
    for (let group = 0; group <= groups; group++) {
      const i = group << 3
      if (
        group < groups &&
        row[i]! < t &&
        row[i + 1]! < t &&
        row[i + 2]! < t &&
        row[i + 3]! < t &&
        row[i + 4]! < t &&
        row[i + 5]! < t &&
        row[i + 6]! < t &&
        row[i + 7]! < t
      ) {
        continue
      }
      const to = Math.min(i + 8, row.length)
      for (let j = i; j < to; j++) {
        const a = (max - row[j]!) * scale
        if (!(a < bound)) continue
        ids[count] = j
        distance[count] = a
        count += 1
      }
    }
    this.count = count
    this.#weighAll()
  }

  #weighAll(): void {
    const rows = this.#rows
    for (let i = 0; i < this.count; i++) this.weight[i] = rows.weight(this.#distance[i]!)
  }

  /** Sum of the weights, in order of ids. */
  total(): number {
    let total = 0
    for (let i = 0; i < this.count; i++) total += this.weight[i]!
    return total
  }

  /**
   * Nucleus (Holtzman et al. 2020): keeps the fewest heaviest candidates that weigh `mass`
   * together. Of equal ones at the boundary the lower ids stay, as they win for greedy; HF leaves
   * it to a sort that is not stable.
   */
  keepNucleus(mass: number): void {
    this.#keys.set(this.#distance.subarray(0, this.count))
    this.#masses.set(this.weight.subarray(0, this.count))
    this.#selectByBucket(mass)
    const cut = this.#cut
    let stay = Math.max(1, Math.ceil(this.#needed / this.#rows.weight(cut)))
    let kept = 0
    for (let i = 0; i < this.count; i++) {
      const a = this.#distance[i]!
      if (a > cut || (a === cut && stay-- <= 0)) continue
      this.#move(i, kept++)
    }
    this.count = kept
  }

  /** Keeps candidates at least `minP` times as probable as the best (Nguyen et al. 2024). */
  keepLikely(minP: number): void {
    let kept = 0
    for (let i = 0; i < this.count; i++) {
      // The best one's weight is 1.
      if (this.weight[i]! >= minP) this.#move(i, kept++)
    }
    this.count = kept
  }

  /**
   * Locally typical sampling (Meister et al. 2022): keeps the candidates whose information is
   * closest to the distribution's entropy until they hold `share` of it; ties all stay.
   * |−log p − H| is |distance − mean distance|, as log p and H contain the same log total.
   */
  keepTypical(share: number): void {
    let total = 0
    let moment = 0
    for (let i = 0; i < this.count; i++) {
      total += this.weight[i]!
      if (this.weight[i]! > 0) moment += this.weight[i]! * this.#distance[i]!
    }
    const mean = moment / total
    for (let i = 0; i < this.count; i++) this.#keys[i] = Math.abs(this.#distance[i]! - mean)
    this.#masses.set(this.weight.subarray(0, this.count))
    this.#selectByBucket(share * total)
    let kept = 0
    for (let i = 0; i < this.count; i++) {
      if (Math.abs(this.#distance[i]! - mean) <= this.#cut) this.#move(i, kept++)
    }
    this.count = kept
  }

  /** The token at which the running sum of weights, by id, exceeds uniform × total. */
  pick(uniform: number): number {
    assert(this.count > 0, 'a filter keeps at least one candidate')
    let left = uniform * this.total()
    for (let i = 0; i < this.count; i++) {
      left -= this.weight[i]!
      if (left < 0) return this.ids[i]!
    }
    return this.ids[this.count - 1]!
  }

  #move(from: number, to: number): void {
    this.ids[to] = this.ids[from]!
    this.#distance[to] = this.#distance[from]!
    this.weight[to] = this.weight[from]!
  }

  /**
   * `#select` for many keys, all ≥ 0: sums masses in a bucket a unit of key and looks closer only
   * at the bucket where the running mass reaches `mass`.
   */
  #selectByBucket(mass: number): void {
    const buckets = this.#buckets
    const last = buckets.length - 1
    buckets.fill(0)
    for (let i = 0; i < this.count; i++) {
      buckets[Math.min(this.#keys[i]!, last) | 0]! += this.#masses[i]!
    }
    let needed = mass
    let bucket = 0
    while (bucket < last && buckets[bucket]! < needed) needed -= buckets[bucket++]!
    let count = 0
    for (let i = 0; i < this.count; i++) {
      if ((Math.min(this.#keys[i]!, last) | 0) !== bucket) continue
      this.#keys[count] = this.#keys[i]!
      this.#masses[count] = this.#masses[i]!
      count += 1
    }
    this.#select(count, needed)
  }

  /**
   * Finds, in ascending order of the first `count` keys, the one at which the running mass reaches
   * `mass` (the last one if it never does), by partitioning only the side that holds it (Hoare's
   * quickselect, three-way for ties). Leaves it in `#cut`. Pivots are picked at random places, as
   * fixed ones take quadratic time on logits that rise and fall; the seed is the same each time.
   */
  #select(count: number, mass: number): void {
    const keys = this.#keys
    const masses = this.#masses
    let low = 0
    let high = count
    let needed = mass
    this.#dice = count
    this.#cut = Infinity
    this.#needed = Infinity
    while (low < high) {
      const span = high - low
      const pivot = median(
        keys[low + this.#roll(span)]!,
        keys[low + this.#roll(span)]!,
        keys[low + this.#roll(span)]!,
      )
      let below = low
      let above = high
      let massBelow = 0
      let massEqual = 0
      for (let i = low; i < above;) {
        const key = keys[i]!
        const weight = masses[i]!
        if (key < pivot) {
          keys[i] = keys[below]!
          masses[i] = masses[below]!
          keys[below] = key
          masses[below] = weight
          massBelow += weight
          below += 1
          i += 1
        } else if (key > pivot) {
          above -= 1
          keys[i] = keys[above]!
          masses[i] = masses[above]!
          keys[above] = key
          masses[above] = weight
        } else {
          massEqual += weight
          i += 1
        }
      }
      if (below > low && massBelow >= needed) {
        high = below
        continue
      }
      this.#cut = pivot
      this.#needed = needed - massBelow
      if (massBelow + massEqual >= needed) return
      // The keys may end here: then all those equal to the last are needed.
      this.#needed = Infinity
      needed -= massBelow + massEqual
      low = above
    }
  }

  /** A whole number in [0, span): a linear congruential generator is random enough for pivots. */
  #roll(span: number): number {
    this.#dice = (Math.imul(this.#dice, 1664525) + 1013904223) >>> 0
    return Math.floor((this.#dice / 2 ** 32) * span)
  }
}

function median(a: number, b: number, c: number): number {
  return Math.max(Math.min(a, b), Math.min(Math.max(a, b), c))
}
