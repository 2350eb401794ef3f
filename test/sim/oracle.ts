// Owns what must come out of each sequence: its tokens computed alone, one after the other, as the
// engine tells them. Nothing is shared here, nothing moved, nothing forgotten.

import { assert } from '../../src/assert.ts'
import { nullLogits } from '../../src/backends/null/backend.ts'
import { extendHash } from '../../src/backends/null/kv-memory.ts'
import type { FinishReason, SequenceRequest, TokenLogprobs } from '../../src/engine/api.ts'
import { Sampler, SamplerState } from '../../src/engine/sampler.ts'
import { saltOf } from './memory.ts'

/** Scratch that all sequences of a run share. */
export class Oracle {
  readonly sampler: Sampler
  readonly logits: Float32Array

  constructor(vocab: number) {
    this.sampler = new Sampler(vocab)
    this.logits = new Float32Array(vocab)
  }
}

export class Expected {
  readonly id: number
  readonly request: SequenceRequest
  /** Of the run; it must have ended by then. */
  readonly deadline: number
  /** The step before which it came. */
  readonly since: number
  /** A hash over the hashes of all tokens so far: what attention over all of them gives. */
  digest: number
  started = false
  /** Prompt, then output. */
  readonly tokens: number[] = []
  private hash: number
  private readonly oracle: Oracle
  private readonly state: SamplerState

  constructor(
    id: number,
    request: SequenceRequest,
    since: number,
    deadline: number,
    oracle: Oracle,
  ) {
    this.since = since
    this.id = id
    this.request = request
    this.deadline = deadline
    this.oracle = oracle
    this.state = new SamplerState(request.sampling, request.prompt)
    this.hash = saltOf(request.tenant)
    this.digest = this.hash
    for (const token of request.prompt) this.read(token)
  }

  get outputTokens(): number {
    return this.tokens.length - this.request.prompt.length
  }

  /** The engine says that it begins. */
  start(): void {
    assert(!this.started, `sequence ${this.id} starts once`)
    this.started = true
  }

  /** The engine says that this token is next. */
  token(token: number, logprobs: TokenLogprobs | undefined): void {
    const { id, request } = this
    assert(this.started, `sequence ${id} starts before it has a token`)
    const at = this.outputTokens
    const expected = this.next()
    assert(token === expected, `token ${at} of sequence ${id} is ${expected}, not ${token}`)
    assert(!request.stopTokens.includes(token), `sequence ${id} ends with a stop token`)
    const { sampler, logits } = this.oracle
    const wanted =
      request.topLogprobs === undefined
        ? undefined
        : sampler.logprobs(logits, token, request.topLogprobs)
    assert(
      JSON.stringify(logprobs) === JSON.stringify(wanted),
      `log probabilities of token ${at} of sequence ${id} are its own`,
    )
  }

  /** The engine says that it is over, by itself. */
  finish(reason: FinishReason, outputTokens: number, _score?: number): void {
    const { id, request } = this
    if (reason === 'stop') {
      const stop = this.next()
      assert(request.stopTokens.includes(stop), `sequence ${id} ends with a stop token`)
    } else {
      assert(this.outputTokens === request.maxTokens, `sequence ${id} ends at its length`)
    }
    this.end(outputTokens)
  }

  /** The engine says that it is over, because somebody asked or something failed. */
  end(outputTokens: number): void {
    const counted = outputTokens === this.outputTokens
    assert(counted, `sequence ${this.id} had ${this.outputTokens} tokens, not ${outputTokens}`)
  }

  private next(): number {
    const { sampler, logits } = this.oracle
    nullLogits(this.digest, logits)
    const token = sampler.sample(logits, this.state)
    this.state.accept(token)
    this.read(token)
    return token
  }

  private read(token: number): void {
    this.tokens.push(token)
    this.hash = extendHash(this.hash, token)
    this.digest = extendHash(this.digest, this.hash)
  }
}
