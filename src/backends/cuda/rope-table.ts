// Owns the angles of rotations as a GPU kernel reads them: radians a position for each pair, all
// scaling included, and what sine and cosine are multiplied by.

import type { RopeConfig } from '../../model/model.ts'

export interface RopeTable {
  frequencies: Float32Array
  magnitude: number
}

/**
 * Pair i turns by base^(−2i/d) radians a position. linear divides that by a factor, `factors` by
 * one of each pair, YaRN (Peng et al. 2023, arXiv:2309.00071) by its factor for pairs that turn
 * less than betaSlow times within the original context, by nothing for those that turn more than
 * betaFast times, and by something between for the others.
 */
export function ropeTable({ base, dimensions, scaling }: RopeConfig): RopeTable {
  const pairs = dimensions / 2
  const plain = Float64Array.from({ length: pairs }, (_, i) => base ** ((-2 * i) / dimensions))
  const table = (of: (i: number) => number) => Float32Array.from(plain, (x, i) => x * of(i))
  switch (scaling.kind) {
    case 'none':
      return { frequencies: table(() => 1), magnitude: 1 }
    case 'linear':
      return { frequencies: table(() => 1 / scaling.factor), magnitude: 1 }
    case 'factors':
      return { frequencies: table((i) => 1 / (scaling.divisors[i] ?? 1)), magnitude: 1 }
    case 'yarn': {
      const { factor, originalContext, betaFast, betaSlow, attentionFactor } = scaling
      // The pair that turns `beta` times in the original context.
      const pairOf = (beta: number) =>
        (dimensions * Math.log(originalContext / (beta * 2 * Math.PI))) / (2 * Math.log(base))
      const low = Math.max(0, Math.floor(pairOf(betaFast)))
      const high = Math.min(dimensions - 1, Math.ceil(pairOf(betaSlow)))
      const kept = (i: number) =>
        1 - Math.min(1, Math.max(0, (i - low) / Math.max(0.001, high - low)))
      const frequencies = table((i) => kept(i) + (1 - kept(i)) / factor)
      return { frequencies, magnitude: attentionFactor }
    }
  }
}
