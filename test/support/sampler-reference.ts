// Owns a second, plain implementation of sampling: float64, sorts, no care for speed. Tests compare
// the real one with it where no golden file reaches.

import type { SamplingParams } from '../../src/engine/api.ts'

/** The distribution over the whole vocabulary after all steps, by their definitions. */
export function referenceDistribution(
  logits: Float32Array,
  params: SamplingParams,
  prompt: readonly number[],
  output: readonly number[],
): number[] {
  // Changed logits are rounded as the row they are stored in rounds them.
  const x = new Float32Array(logits)
  for (const [token, bias] of params.logitBias) x[token]! += bias
  for (const token of new Set([...prompt, ...output])) {
    const count = output.filter((o) => o === token).length
    const penalty = params.repetitionPenalty
    let value = x[token]! < 0 ? x[token]! * penalty : x[token]! / penalty
    if (count > 0) value -= params.presencePenalty + params.frequencyPenalty * count
    x[token] = value
  }
  if (params.temperature === 0) {
    const best = x.indexOf(Math.max(...x))
    return Array.from(x, (_, i) => (i === best ? 1 : 0))
  }
  let scores = Array.from(x, (v) => v / params.temperature)
  if (params.topK > 0 && params.topK < scores.length) {
    const kth = scores.toSorted((a, b) => b - a)[params.topK - 1]!
    scores = scores.map((s) => (s < kth ? -Infinity : s))
  }
  if (params.topP < 1) scores = nucleus(scores, params.topP)
  if (params.minP > 0) {
    const p = softmax(scores)
    const least = params.minP * Math.max(...p)
    scores = scores.map((s, i) => (p[i]! < least ? -Infinity : s))
  }
  if (params.typicalP < 1) scores = typical(scores, params.typicalP)
  return softmax(scores)
}

export function softmax(scores: readonly number[]): number[] {
  const max = Math.max(...scores)
  const weights = scores.map((s) => Math.exp(s - max))
  const total = weights.reduce((sum, w) => sum + w, 0)
  return weights.map((w) => w / total)
}

function nucleus(scores: readonly number[], topP: number): number[] {
  const p = softmax(scores)
  const order = scores.map((_, i) => i).toSorted((a, b) => scores[b]! - scores[a]! || a - b)
  const kept = new Set<number>()
  let before = 0
  for (const token of order) {
    if (kept.size > 0 && before >= topP) break
    kept.add(token)
    before += p[token]!
  }
  return scores.map((s, i) => (kept.has(i) ? s : -Infinity))
}

function typical(scores: readonly number[], share: number): number[] {
  const p = softmax(scores)
  const information = p.map((q) => -Math.log(q))
  const entropy = p.reduce((sum, q, i) => (q > 0 ? sum + q * information[i]! : sum), 0)
  const surprise = information.map((h) => Math.abs(h - entropy))
  const order = surprise.map((_, i) => i).toSorted((a, b) => surprise[a]! - surprise[b]!)
  let mass = 0
  let cut = Infinity
  for (const token of order) {
    mass += p[token]!
    cut = surprise[token]!
    if (mass >= share) break
  }
  return scores.map((s, i) => (surprise[i]! <= cut + 1e-12 ? s : -Infinity))
}
