// Owns what must come out of a beam search: found by a plain one over whole sequences.

import { assert, present } from '../../src/assert.ts'
import { nullLogits } from '../../src/backends/null/backend.ts'
import type { FinishReason, SequenceRequest } from '../../src/engine/api.ts'
import { referenceBeams } from '../support/beam-reference.ts'
import { digestOf, saltOf } from './memory.ts'
import { Expected, type Oracle } from './oracle.ts'

/** Scores are sums, which may be added up in another order. */
const SCORE_ERROR = 1e-4

export class ExpectedBeam extends Expected {
  private readonly rank: number
  private readonly scratch: Oracle
  private found: ReturnType<typeof referenceBeams> | undefined

  /** @param rank among the answers of its request; 0 is the best */
  constructor(
    id: number,
    rank: number,
    request: SequenceRequest,
    since: number,
    deadline: number,
    oracle: Oracle,
  ) {
    super(id, request, since, deadline, oracle)
    this.rank = rank
    this.scratch = oracle
  }

  override token(token: number): void {
    const at = this.outputTokens
    const right = this.answer()?.tokens[at]
    assert(token === right, `token ${at} of beam ${this.id} is ${right}, not ${token}`)
    this.tokens.push(token)
  }

  override finish(reason: FinishReason, outputTokens: number, score?: number): void {
    const answer = present(this.answer(), `answer ${this.rank}`)
    const { stopped, tokens } = answer
    assert((reason === 'stop') === stopped, `beam ${this.id} stops as it should`)
    assert(outputTokens === tokens.length, `beam ${this.id} has ${tokens.length} tokens`)
    assert(this.outputTokens === tokens.length - +stopped, `beam ${this.id} is told whole`)
    const error = Math.abs((score ?? Infinity) - answer.score)
    assert(error < SCORE_ERROR, `beam ${this.id} is worth ${answer.score}, not ${score}`)
  }

  private answer(): ReturnType<typeof referenceBeams>[number] | undefined {
    this.found ??= this.search()
    return this.found[this.rank]
  }

  private search(): ReturnType<typeof referenceBeams> {
    const { request, scratch } = this
    const { beams, maxTokens, stopTokens, prompt, tenant } = request
    const { sampler, logits } = scratch
    const salt = saltOf(tenant)
    const before = [...prompt]
    return referenceBeams(present(beams, 'beams'), maxTokens, stopTokens, (tokens) => {
      nullLogits(digestOf(salt, [...before, ...tokens], before.length + tokens.length), logits)
      return Array.from(logits, (_, token) => sampler.logprobs(logits, token, 0).logprob)
    })
  }
}
