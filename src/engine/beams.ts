// Owns the bookkeeping of one beam search: which continuations go on, which are finished, and when
// no better one can come. Pure: log-probabilities go in, parents and tokens come out.
//
// What is kept and when it ends is as HF transformers' `generate` has it (num_beams,
// length_penalty, early_stopping), so that hypotheses and scores are the same:
//
//   candidates   the (1 + stop tokens) × width best of all continuations, 2 × width at least
//   finished     those of the best `width` candidates that stop; the best `width` ever are kept
//   running      the best `width` candidates that do not stop
//
// Equal scores: the better beam's first, then the lower token's; a finished one stays before a new.

import { assert, present } from '../assert.ts'
import type { BeamParams, TokenLogprobs } from './api.ts'

/** A token and, through its parents, all before it. */
interface Node {
  parent: Node | undefined
  token: number
  logprobs: TokenLogprobs
}

interface Beam {
  node: Node | undefined
  /** Sum of log-probabilities. */
  sum: number
}

interface Candidate {
  /** Index of the running beam that it continues. */
  parent: number
  token: number
  logprob: number
  sum: number
}

export interface Continuation {
  parent: number
  token: number
}

export interface Hypothesis {
  /** With the stop token, if it ends with one. */
  tokens: number[]
  logprobs: TokenLogprobs[]
  /** Sum of log-probabilities / tokens^length_penalty. */
  score: number
  stopped: boolean
}

interface Finished {
  node: Node
  score: number
  stopped: boolean
}

type Likeliest = TokenLogprobs['top']

export class BeamSearch {
  /** Tokens that each running beam must offer: its likeliest, as many as there are. */
  readonly candidates: number
  /** Tokens of every running beam. */
  length = 0
  private readonly params: BeamParams
  private readonly maxTokens: number
  private readonly stopTokens: readonly number[]
  private readonly alternatives: number
  private running: Beam[] = [{ node: undefined, sum: 0 }]
  private finished: Finished[] = []
  private offers: (Likeliest | undefined)[] = []

  /** @param alternatives to report with each token */
  constructor(
    params: BeamParams,
    maxTokens: number,
    stopTokens: readonly number[],
    alternatives = 0,
  ) {
    this.params = params
    this.maxTokens = maxTokens
    this.stopTokens = stopTokens
    this.alternatives = alternatives
    this.candidates = Math.max(2, 1 + stopTokens.length) * params.width
  }

  /** Running beams, the best first. */
  get beams(): number {
    return this.running.length
  }

  /** What may follow a running beam, the likeliest first. */
  offer(beam: number, likeliest: Likeliest): void {
    this.offers[beam] = likeliest
  }

  /**
   * Goes on by a token, once every running beam has made its offer.
   * @returns what each beam that now runs continues, the best first; none if the search is over
   */
  advance(): Continuation[] {
    const { width, lengthPenalty } = this.params
    const candidates = this.best()
    const last = ++this.length === this.maxTokens
    const going: Candidate[] = []
    const ended: Finished[] = []
    candidates.forEach((candidate, rank) => {
      const stopped = this.stopTokens.includes(candidate.token)
      if (!stopped && !last) {
        if (going.length < width) going.push(candidate)
      } else if (rank < width) {
        const score = candidate.sum / this.length ** lengthPenalty
        ended.push({ node: this.nodeOf(candidate), score, stopped })
      }
    })
    this.finished = [...this.finished, ...ended].toSorted((a, b) => b.score - a.score)
    this.finished.length = Math.min(this.finished.length, width)
    this.running = going.map((candidate) => ({
      node: this.nodeOf(candidate),
      sum: candidate.sum,
    }))
    this.offers = []
    return this.over ? [] : going
  }

  /** What came out, the best first. */
  hypotheses(): Hypothesis[] {
    return this.finished.map(({ node, score, stopped }) => {
      const nodes: Node[] = []
      for (let at: Node | undefined = node; at; at = at.parent) nodes.push(at)
      nodes.reverse()
      const tokens = nodes.map(({ token }) => token)
      return { tokens, logprobs: nodes.map(({ logprobs }) => logprobs), score, stopped }
    })
  }

  /** No running beam can become better than what is finished, or none is looked for. */
  private get over(): boolean {
    const { width, lengthPenalty, earlyStopping } = this.params
    const best = this.running[0]
    if (!best) return true
    const worst = this.finished[width - 1]
    if (!worst) return false
    if (earlyStopping === true) return true
    // Longer is better under a penalty: then only 'never' waits for the longest there could be.
    const longest = earlyStopping === 'never' && lengthPenalty > 0
    const length = longest ? this.maxTokens : this.length
    return best.sum / length ** lengthPenalty <= worst.score
  }

  /** The best candidates of all beams: a merge of their offers. */
  private best(): Candidate[] {
    const at = this.running.map(() => 0)
    const best: Candidate[] = []
    while (best.length < this.candidates) {
      let next: Candidate | undefined
      for (const [parent, beam] of this.running.entries()) {
        const offer = present(this.offers[parent], 'an offer of every beam')[at[parent] ?? 0]
        if (!offer || offer.logprob === -Infinity) continue
        const sum = beam.sum + offer.logprob
        if (!next || sum > next.sum) next = { parent, ...offer, sum }
      }
      if (!next) break
      at[next.parent] = (at[next.parent] ?? 0) + 1
      best.push(next)
    }
    assert(best.length > 0, 'some token may follow')
    return best
  }

  private nodeOf({ parent, token, logprob }: Candidate): Node {
    const top = present(this.offers[parent], 'an offer').slice(0, this.alternatives)
    return { parent: this.running[parent]?.node, token, logprobs: { logprob, top } }
  }
}
