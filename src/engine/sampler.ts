// Owns the choice of the next token from a row of logits: which steps run, in which order. The
// passes over rows are in sampler-rows, the filters in sampler-candidates, and a sequence's
// parameters, counts and random numbers in sampler-state.

import { assert } from '../assert.ts'
import { LatticeError } from '../errors.ts'
import type { TokenLogprobs } from './api.ts'
import { Candidates } from './sampler-candidates.ts'
import { argmax, RowWeights, UNITS_PER_NAT } from './sampler-rows.ts'
import type { SamplerState } from './sampler-state.ts'

export { SamplerState } from './sampler-state.ts'

/**
 * Chooses tokens. The order of steps is
 *
 *   logit_bias → repetition penalty (prompt and output) → presence and frequency penalties
 *   (output) → temperature → top_k → top_p → min_p → typical_p → one draw
 *
 * Up to the temperature it is vLLM's order; the filters come in the order of HF transformers and
 * mean what its warpers mean (vLLM filters by min_p before top_k; that differs only when min_p and
 * top_p are both on). At temperature 0 the filters have no say: the largest logit wins, and of
 * equal ones the lowest id. A draw inverts the cumulative distribution in order of token ids.
 *
 * One instance serves all sequences of an engine: it is scratch, allocated once. Neither `sample`
 * nor `accept` allocates, except that penalties' counts double their arrays as new tokens come up.
 */
export class Sampler {
  readonly #vocab: number
  readonly #rows: RowWeights
  readonly #candidates: Candidates
  /** Logits that bias and penalties changed, to be put back. */
  readonly #changedTokens: Int32Array
  readonly #changedLogits: Float32Array
  #changed = 0

  /** @param vocab logits in a row */
  constructor(vocab: number) {
    this.#vocab = vocab
    this.#rows = new RowWeights(vocab)
    this.#candidates = new Candidates(vocab, this.#rows)
    // A token is biased once and penalised once at most.
    this.#changedTokens = new Int32Array(2 * vocab)
    this.#changedLogits = new Float32Array(2 * vocab)
  }

  /**
   * The next token of a sequence. The row is changed while this runs and is as it was after.
   *
   * @param logits one row, `vocab` long, natural-log units.
   * @throws LatticeError `backend_failed` if a logit is NaN or +Infinity, or all are -Infinity;
   *   `invalid_request` if logit_bias names a token that the vocabulary lacks.
   */
  sample(logits: Float32Array, state: SamplerState): number {
    assert(logits.length === this.#vocab, 'a row has one logit per token')
    this.#adjust(logits, state)
    const token = state.params.temperature === 0 ? argmax(logits) : this.#draw(logits, state)
    this.#restore(logits)
    return token
  }

  /** Tells the sequence's penalties of a token it generated. */
  accept(state: SamplerState, token: number): void {
    state.accept(token)
  }

  /**
   * Log-probabilities under the model's own distribution: no bias, penalty, temperature or filter.
   *
   * @param logits the row as the model made it (as `sample` leaves it).
   * @param top how many of the likeliest tokens to list; equal ones by id.
   * @throws LatticeError `backend_failed` as `sample` does.
   */
  logprobs(logits: Float32Array, token: number, top: number): TokenLogprobs {
    const max = logits[argmax(logits)]!
    const norm = max + Math.log(this.#rows.sum(logits, max, UNITS_PER_NAT))
    const list: { token: number; logprob: number }[] = []
    if (top > 0) {
      const best = this.#candidates
      best.takeTop(logits, top)
      for (let i = 0; i < best.count; i++) {
        list.push({ token: best.ids[i]!, logprob: best.logits[i]! - norm })
      }
      list.sort((a, b) => b.logprob - a.logprob || a.token - b.token)
      list.length = Math.min(list.length, top)
    }
    return { logprob: logits[token]! - norm, top: list }
  }

  /**
   * The distribution that `sample` would draw from, for tests and for looking inside: tokens
   * with any chance, by id, and their probabilities. Allocates; draws nothing.
   */
  distribution(
    logits: Float32Array,
    state: SamplerState,
  ): { tokens: Int32Array; probabilities: Float64Array } {
    this.#adjust(logits, state)
    if (state.params.temperature === 0) {
      const best = argmax(logits)
      this.#restore(logits)
      return { tokens: Int32Array.of(best), probabilities: Float64Array.of(1) }
    }
    this.#filter(logits, state)
    this.#restore(logits)
    const { ids, weight, count } = this.#candidates
    const total = this.#candidates.total()
    return {
      tokens: ids.slice(0, count),
      probabilities: weight.slice(0, count).map((w) => w / total),
    }
  }

  /** Adds biases and applies penalties, in place; `#restore` undoes it. */
  #adjust(row: Float32Array, state: SamplerState): void {
    this.#changed = 0
    for (let i = 0; i < state.biasTokens.length; i++) {
      const token = state.biasTokens[i]!
      if (token >= this.#vocab) throw unknownToken(token, this.#vocab)
      this.#change(row, token, row[token]! + state.biases[i]!)
    }
    if (!state.penalised) return
    const { repetitionPenalty, presencePenalty, frequencyPenalty } = state.params
    for (let i = 0; i < state.seenCount; i++) {
      const token = state.seen[i]!
      const count = state.outputs[i]!
      const before = row[token]!
      let logit = before < 0 ? before * repetitionPenalty : before / repetitionPenalty
      if (count > 0) logit -= presencePenalty + frequencyPenalty * count
      this.#change(row, token, logit)
    }
  }

  #change(row: Float32Array, token: number, logit: number): void {
    this.#changedTokens[this.#changed] = token
    this.#changedLogits[this.#changed] = row[token]!
    this.#changed += 1
    row[token] = logit
  }

  /** Backwards, because a token may have changed twice. */
  #restore(row: Float32Array): void {
    for (let i = this.#changed - 1; i >= 0; i--) {
      row[this.#changedTokens[i]!] = this.#changedLogits[i]!
    }
  }

  #draw(row: Float32Array, state: SamplerState): number {
    const uniform = state.random.uniform()
    if (state.filtered) {
      this.#filter(row, state)
      return this.#candidates.pick(uniform)
    }
    const max = row[argmax(row)]!
    const total = this.#rows.sum(row, max, state.scale)
    return this.#rows.locate(row, max, state.scale, uniform * total)
  }

  /** Leaves the candidates that all filters keep, at least one. */
  #filter(row: Float32Array, state: SamplerState): void {
    const { topK, topP, minP, typicalP } = state.params
    const scale = state.scale
    const candidates = this.#candidates
    if (topK > 0 && topK < this.#vocab) {
      candidates.takeTop(row, topK)
      candidates.weigh(scale)
      if (topP < 1) candidates.keepNucleus(topP * candidates.total())
    } else {
      const max = row[argmax(row)]!
      if (topP < 1) {
        const bound = this.#rows.boundOf(row, max, scale, topP)
        candidates.takeNear(row, max, scale, bound)
        candidates.keepNucleus(topP * this.#rows.total)
      } else {
        // Nothing less likely than min_p allows can stay; a unit more is for rounding.
        const bound = minP > 0 ? -Math.log(minP) * UNITS_PER_NAT + 1 : Infinity
        candidates.takeNear(row, max, scale, Math.min(bound, this.#rows.limit))
      }
    }
    if (minP > 0) candidates.keepLikely(minP)
    if (typicalP < 1) candidates.keepTypical(typicalP)
  }
}

function unknownToken(token: number, vocab: number): LatticeError {
  return new LatticeError(
    'invalid_request',
    `logit_bias names token ${token}, but the model has only ${vocab} tokens.`,
    { todo: 'Leave that token out of logit_bias.', details: { param: 'logit_bias' } },
  )
}
