// Owns a beam search written as plainly as HF transformers' `generate` defines it: whole sequences,
// every continuation of each, and sorting. Slow, and without any engine.

import type { BeamParams } from '../../src/engine/api.ts'

export interface Reference {
  tokens: number[]
  score: number
  stopped: boolean
}

/** @param logprobsAfter the log-probability of every token after these output tokens */
export function referenceBeams(
  params: BeamParams,
  maxTokens: number,
  stopTokens: readonly number[],
  logprobsAfter: (tokens: readonly number[]) => readonly number[],
): Reference[] {
  const { width, lengthPenalty, earlyStopping } = params
  const keep = Math.max(2, 1 + stopTokens.length) * width
  let running: { tokens: number[]; sum: number }[] = [{ tokens: [], sum: 0 }]
  let finished: Reference[] = []
  for (let length = 1; ; length++) {
    const continuations = running.flatMap(({ tokens, sum }) =>
      logprobsAfter(tokens).map((logprob, token) => ({
        tokens: [...tokens, token],
        sum: sum + logprob,
        stopped: stopTokens.includes(token),
      })),
    )
    const top = continuations.toSorted((a, b) => b.sum - a.sum).slice(0, keep)
    const ends = (stopped: boolean) => stopped || length === maxTokens
    const scored = top
      .slice(0, width)
      .filter(({ stopped }) => ends(stopped))
      .map(({ tokens, sum, stopped }) => ({
        tokens,
        score: sum / length ** lengthPenalty,
        stopped,
      }))
    finished = [...finished, ...scored].toSorted((a, b) => b.score - a.score).slice(0, width)
    running = top.filter(({ stopped }) => !ends(stopped)).slice(0, width)
    if (running.length === 0) return finished
    if (finished.length < width) continue
    if (earlyStopping === true) return finished
    const hopeful = earlyStopping === 'never' && lengthPenalty > 0 ? maxTokens : length
    if (running[0]!.sum / hopeful ** lengthPenalty <= finished.at(-1)!.score) return finished
  }
}
