// Owns what engine tests share: an engine core over a backend, driven step by step with a clock of
// its own, and what a sequence's tokens must be, found without any engine.

import type {
  EngineSnapshot,
  FinishReason,
  SamplingParams,
  SequenceRequest,
  TokenLogprobs,
} from '../../src/engine/api.ts'
import { GREEDY } from '../../src/engine/api.ts'
import { EngineCore } from '../../src/engine/core.ts'
import type { CoreOptions } from '../../src/engine/core-contract.ts'
import { Sampler, SamplerState } from '../../src/engine/sampler.ts'
import type { Backend } from '../../src/backends/backend.ts'
import { nullLogits } from '../../src/backends/null/backend.ts'
import { extendHash } from '../../src/backends/null/kv-memory.ts'
import type { LatticeError } from '../../src/errors.ts'
import { referenceBeams } from './beam-reference.ts'

export const VOCAB = 50

export function sequenceRequest(change: Partial<SequenceRequest> = {}): SequenceRequest {
  return {
    requestId: 'r',
    tenant: 'default',
    prompt: Int32Array.of(1, 2, 3),
    sampling: GREEDY,
    maxTokens: 8,
    stopTokens: [],
    topLogprobs: undefined,
    ...change,
  }
}

/** What came out of a sequence. */
export interface Outcome {
  started: number
  cachedTokens: number
  tokens: number[]
  logprobs: (TokenLogprobs | undefined)[]
  reason: FinishReason | undefined
  outputTokens: number
  error: LatticeError | undefined
  score: number | undefined
}

/** What happens before a step; the first is 0. */
export interface BenchEvent {
  at: number
  act: () => void
}

/** An engine core whose clock moves a millisecond a step. */
export class Bench {
  readonly core: EngineCore
  readonly backend: Backend
  readonly outcomes = new Map<number, Outcome>()
  nowMs = 0

  constructor(backend: Backend, options: CoreOptions) {
    this.backend = backend
    const of = (id: number): Outcome => {
      const outcome = this.outcomes.get(id)
      if (!outcome || outcome.reason !== undefined) throw new Error(`news of ${id} when it is over`)
      return outcome
    }
    const sink = {
      onStart: (id: number, cachedTokens: number) => {
        of(id).started++
        of(id).cachedTokens = cachedTokens
      },
      onToken: (id: number, token: number, logprobs: TokenLogprobs | undefined) => {
        of(id).tokens.push(token)
        of(id).logprobs.push(logprobs)
      },
      onFinish: (
        id: number,
        reason: FinishReason,
        count: number,
        error: LatticeError | undefined,
        score: number | undefined,
      ) => {
        Object.assign(of(id), { reason, outputTokens: count, error, score })
      },
    }
    this.core = new EngineCore(backend, options, sink, () => this.nowMs)
  }

  submit(id: number, request: SequenceRequest): void {
    this.expect(id)
    this.core.submit(id, request)
  }

  submitChoices(
    ids: readonly number[],
    request: SequenceRequest,
    samplings: readonly SamplingParams[],
  ): void {
    for (const id of ids) this.expect(id)
    this.core.submitChoices(ids, request, samplings)
  }

  fork(parent: number, id: number, sampling: SamplingParams): void {
    this.expect(id)
    this.core.fork(parent, id, sampling)
  }

  private expect(id: number): void {
    this.outcomes.set(id, {
      started: 0,
      cachedTokens: 0,
      tokens: [],
      logprobs: [],
      reason: undefined,
      outputTokens: 0,
      error: undefined,
      score: undefined,
    })
  }

  step(): boolean {
    this.nowMs++
    return this.core.step()
  }

  /** Steps until nothing is left to do. */
  runAll(stepsMax = 100_000): void {
    for (let i = 0; this.step() || !this.core.idle; i++)
      if (i > stepsMax) throw new Error('the engine never ends')
  }

  /** Steps until all that is to happen has, and nothing is left to do. `check` sees each step. */
  play(events: BenchEvent[], check: (kv: EngineSnapshot['kv']) => void, stepsMax = 10_000): void {
    for (let step = 0; events.length > 0 || !this.core.idle; step++) {
      for (const event of events.filter(({ at }) => at === step)) {
        events.splice(events.indexOf(event), 1)
        event.act()
      }
      this.step()
      this.core.check()
      check(this.core.snapshot().kv)
      if (step > stepsMax) throw new Error('the engine never ends')
    }
  }

  /** Lets time pass until all memory is back. */
  settle(timesMax = 100_000): void {
    let times = 0
    for (let wait = this.core.settle(); wait !== undefined; wait = this.core.settle()) {
      this.nowMs += wait
      if (++times > timesMax) throw new Error('memory is never given back')
    }
  }

  outcome(id: number): Outcome {
    return this.outcomes.get(id)!
  }
}

/** What a sequence on the null backend must come to: its tokens alone decide, nothing around it. */
export function expectedOutcome(
  request: SequenceRequest,
  vocab = VOCAB,
): Pick<Outcome, 'tokens' | 'reason' | 'outputTokens'> {
  const sampler = new Sampler(vocab)
  const state = new SamplerState(request.sampling, request.prompt)
  const logits = new Float32Array(vocab)
  let hash = request.prompt.reduce(extendHash, 0)
  const tokens: number[] = []
  for (;;) {
    nullLogits(hash, logits)
    const token = sampler.sample(logits, state)
    state.accept(token)
    hash = extendHash(hash, token)
    if (request.stopTokens.includes(token)) {
      return { tokens, reason: 'stop', outputTokens: tokens.length + 1 }
    }
    tokens.push(token)
    if (tokens.length === request.maxTokens) {
      return { tokens, reason: 'length', outputTokens: tokens.length }
    }
  }
}

/** What a beam search on it must find, the best first. */
export function expectedBeams({ prompt, maxTokens, stopTokens, beams }: SequenceRequest) {
  const hash = prompt.reduce(extendHash, 0)
  return referenceBeams(beams!, maxTokens, stopTokens, (tokens) =>
    logprobsAfter(tokens.reduce(extendHash, hash)),
  )
}

/** Of every token after all that a hash is of. */
export function logprobsAfter(hash: number): number[] {
  const row = new Float32Array(VOCAB)
  nullLogits(hash, row)
  const sum = Math.log(row.reduce((total, logit) => total + Math.exp(logit), 0))
  return Array.from(row, (logit) => logit - sum)
}
