// Owns what sampling remembers of one sequence: its checked parameters, its random stream, and how
// often each token has come up, kept only when a penalty asks for it.

import { LatticeError } from '../errors.ts'
import type { SamplingParams } from './api.ts'
import { RandomStream } from './sampler-random.ts'
import { UNITS_PER_NAT } from './sampler-rows.ts'

const NO_TOKENS = new Int32Array(0)
const NO_BIASES = new Float64Array(0)

/** One sequence's side of the sampler; make one a sequence and keep it while that lives. */
export class SamplerState {
  readonly params: SamplingParams
  readonly random: RandomStream
  /** Distinct biased tokens and what each is given; duplicates in the parameters add up. */
  readonly biasTokens: Int32Array
  readonly biases: Float64Array
  /** Distance units (see sampler-rows) in one unit of logit at this temperature. */
  readonly scale: number
  /** Any of the four filters is on. */
  readonly filtered: boolean
  /** Any of the three penalties is on, so tokens are counted. */
  readonly penalised: boolean
  /** The first `seenCount` are distinct tokens; `outputs` says how often each was generated. */
  seen = NO_TOKENS
  outputs = NO_TOKENS
  seenCount = 0
  #index: Map<number, number> | undefined

  /**
   * @param prompt tokens of the prompt; read only when there is a repetition penalty.
   * @throws LatticeError `invalid_request` naming the parameter that is out of range.
   */
  constructor(params: SamplingParams, prompt: ArrayLike<number>) {
    checkParams(params)
    this.params = params
    this.random = new RandomStream(params.seed)
    const bias = params.logitBias.length > 0 ? summedBias(params) : undefined
    this.biasTokens = bias ? Int32Array.from(bias.keys()) : NO_TOKENS
    this.biases = bias ? Float64Array.from(bias.values()) : NO_BIASES
    // Bounded so that a distance of 0 stays 0 at the tiniest temperature.
    this.scale = Math.min(UNITS_PER_NAT / params.temperature, Number.MAX_VALUE)
    this.filtered = params.topK > 0 || params.topP < 1 || params.minP > 0 || params.typicalP < 1
    const repeats = params.repetitionPenalty !== 1
    this.penalised = repeats || params.presencePenalty !== 0 || params.frequencyPenalty !== 0
    if (repeats) for (let i = 0; i < prompt.length; i++) this.#see(prompt[i]!)
  }

  /** Counts a generated token; free when there are no penalties. */
  accept(token: number): void {
    if (!this.penalised) return
    const index = this.#see(token)
    this.outputs[index]! += 1
  }

  #see(token: number): number {
    this.#index ??= new Map()
    const known = this.#index.get(token)
    if (known !== undefined) return known
    const index = this.seenCount++
    if (index === this.seen.length) {
      this.seen = enlarged(this.seen)
      this.outputs = enlarged(this.outputs)
    }
    this.seen[index] = token
    this.#index.set(token, index)
    return index
  }
}

function summedBias({ logitBias }: SamplingParams): Map<number, number> {
  const bias = new Map<number, number>()
  for (const [token, value] of logitBias) bias.set(token, (bias.get(token) ?? 0) + value)
  return bias
}

function enlarged(from: Int32Array<ArrayBuffer>): Int32Array<ArrayBuffer> {
  const to = new Int32Array(Math.max(64, from.length * 2))
  to.set(from)
  return to
}

function checkParams(params: SamplingParams): void {
  const { temperature, topK, topP, minP, typicalP, repetitionPenalty, seed } = params
  check('temperature', temperature, 'a number ≥ 0', temperature >= 0)
  check('top_k', topK, 'a whole number ≥ 0', Number.isInteger(topK) && topK >= 0)
  check('top_p', topP, 'between 0 and 1', topP >= 0 && topP <= 1)
  check('min_p', minP, 'between 0 and 1', minP >= 0 && minP <= 1)
  check('typical_p', typicalP, 'above 0 and at most 1', typicalP > 0 && typicalP <= 1)
  check('repetition_penalty', repetitionPenalty, 'a number above 0', repetitionPenalty > 0)
  check('presence_penalty', params.presencePenalty, 'a number', true)
  check('frequency_penalty', params.frequencyPenalty, 'a number', true)
  check('seed', seed, 'a whole number within ±(2^53 − 1)', Number.isSafeInteger(seed))
  for (const [token, bias] of params.logitBias) {
    check('logit_bias', token, 'a token id', Number.isInteger(token) && token >= 0)
    check('logit_bias', bias, 'a number', true)
  }
}

function check(param: string, value: number, must: string, holds: boolean): void {
  if (holds && Number.isFinite(value)) return
  throw new LatticeError('invalid_request', `${param} is ${value}; it must be ${must}.`, {
    todo: `Send ${param} as ${must}, or leave it out.`,
    details: { param },
  })
}
