// Catches bookkeeping of beams that differs from a plain search: on distributions made so that
// stops, ties, penalties and every way of stopping early come up.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { referenceBeams } from '../../test/support/beam-reference.ts'
import { Random } from '../../test/support/random.ts'
import type { BeamParams } from './api.ts'
import { BeamSearch, type Hypothesis } from './beams.ts'

const VOCAB = 12

type Model = (tokens: readonly number[]) => readonly number[]

/** Log-probabilities that depend on the last two tokens; equal ones are common when coarse. */
function modelOf(seed: number, coarse: boolean): Model {
  const rows = new Map<string, number[]>()
  return (tokens) => {
    const key = tokens.slice(-2).join()
    let row = rows.get(key)
    if (!row) {
      const random = new Random(seed + [...key].reduce((sum, c) => 31 * sum + c.charCodeAt(0), 7))
      const logits = Array.from({ length: VOCAB }, () =>
        coarse ? random.below(3) : 4 * random.next(),
      )
      const norm = Math.log(logits.reduce((sum, logit) => sum + Math.exp(logit), 0))
      row = logits.map((logit) => logit - norm)
      rows.set(key, row)
    }
    return row
  }
}

/** The search, with its beams' tokens kept as an engine would. */
function search(
  params: BeamParams,
  maxTokens: number,
  stopTokens: number[],
  model: Model,
): Hypothesis[] {
  const beams = new BeamSearch(params, maxTokens, stopTokens)
  let running: number[][] = [[]]
  for (;;) {
    running.forEach((tokens, beam) => {
      const likeliest = model(tokens)
        .map((logprob, token) => ({ token, logprob }))
        .toSorted((a, b) => b.logprob - a.logprob)
      beams.offer(beam, likeliest.slice(0, beams.candidates))
    })
    const next = beams.advance()
    if (next.length === 0) return beams.hypotheses()
    assert.equal(beams.beams, next.length)
    running = next.map(({ parent, token }) => [...running[parent]!, token])
  }
}

function withoutLogprobs(found: readonly Hypothesis[]) {
  return found.map(({ tokens, score, stopped }) => ({ tokens, score, stopped }))
}

test('a hypothesis, its score or its rank is not that of a plain search', () => {
  const lengths = new Set<number>()
  for (let seed = 1; seed <= 400; seed++) {
    const random = new Random(seed)
    const params: BeamParams = {
      width: 2 + random.below(6),
      lengthPenalty: random.pick([-1, 0, 0.5, 1, 2]),
      earlyStopping: random.pick([true, false, 'never']),
    }
    const stops = random.pick([[], [3], [3, 7], [1, 2, 3, 4]])
    const model = modelOf(seed, seed % 4 === 0)
    const maxTokens = 1 + random.below(14)
    const found = withoutLogprobs(search(params, maxTokens, stops, model))
    assert.deepEqual(found, referenceBeams(params, maxTokens, stops, model), `seed ${seed}`)
    for (const { tokens } of found) lengths.add(tokens.length)
  }
  assert.equal(lengths.size, 14)
})

test('early stopping waits too long, or does not wait where a better one may come', () => {
  // A stop is likely at once; going on costs little at each token.
  const model: Model = (tokens) => (tokens.length === 0 ? [-1, -1.2, -9] : [-0.1, -3, -3])
  const found = (earlyStopping: BeamParams['earlyStopping'], lengthPenalty: number) =>
    search({ width: 2, lengthPenalty, earlyStopping }, 50, [1], model).map(
      ({ tokens }) => tokens.length,
    )
  assert.deepEqual(found(true, 1), [1, 2])
  assert.deepEqual(found('never', 0), [1, 2])
  assert.deepEqual(found('never', 1), [50, 50])
})

test('a token that cannot follow does, or its lack goes unnoticed', () => {
  const only: Model = () => [-Infinity, 0, -Infinity]
  const params: BeamParams = { width: 3, lengthPenalty: 1, earlyStopping: false }
  const found = withoutLogprobs(search(params, 4, [], only))
  assert.deepEqual(found, [{ tokens: [1, 1, 1, 1], score: 0, stopped: false }])
})
