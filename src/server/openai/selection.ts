// Owns how a request's answers are found among more than it asks for: the best of some samples, or
// a beam search. Their parameters mean what vLLM and OpenAI's API gave them.

import type { BeamParams } from '../../engine/api.ts'
import { type ErrorCode, LatticeError } from '../../errors.ts'
import type { SharedParameters } from './parameters.ts'

export interface Selection {
  /** Answers that are returned, and how many are generated for each prompt. */
  choices: number
  bestOf: number
  beams?: BeamParams
}

/** @throws LatticeError naming the parameter that another one contradicts */
export function selectionOf(parameters: SharedParameters): Selection {
  const choices = parameters.n ?? 1
  const bestOf = parameters.best_of ?? choices
  if (bestOf < choices) throw wrong('best_of', `is ${bestOf}, less than 'n', which is ${choices}.`)
  if (parameters.stream && (parameters.use_beam_search || bestOf > choices)) {
    throw wrong('stream', 'cannot be true: which answers are the best is known at the end only.')
  }
  if (parameters.use_beam_search) return { choices, bestOf, beams: beamsOf(parameters, bestOf) }
  if ((parameters.length_penalty ?? 1) !== 1) throw needsBeams('length_penalty')
  if ((parameters.early_stopping ?? false) !== false) throw needsBeams('early_stopping')
  if (bestOf > choices && parameters.temperature === 0) {
    throw wrong('best_of', "needs a 'temperature' above 0: without it all samples are the same.")
  }
  return { choices, bestOf }
}

function beamsOf(parameters: SharedParameters, width: number): BeamParams {
  if (width < 2) throw wrong('best_of', 'must be at least 2 with a beam search: it is its width.')
  for (const [param, neutral] of NEUTRAL) {
    const given = parameters[param]
    if (given !== undefined && given !== neutral) {
      throw wrong(param, `must be ${neutral} or left out with 'use_beam_search'.`)
    }
  }
  if ((parameters.top_k ?? 0) > 0) throw wrong('top_k', "must be 0 with 'use_beam_search'.")
  if (parameters.stop?.length) {
    throw wrong('stop', "is not supported with 'use_beam_search'.", 'unsupported_parameter')
  }
  if (parameters.logit_bias?.length) {
    throw wrong('logit_bias', "is not supported with 'use_beam_search'.", 'unsupported_parameter')
  }
  return {
    width,
    lengthPenalty: parameters.length_penalty ?? 1,
    earlyStopping: parameters.early_stopping ?? false,
  }
}

/** Values that leave likelihoods as they are. */
const NEUTRAL = [
  ['temperature', 0],
  ['top_p', 1],
  ['min_p', 0],
  ['typical_p', 1],
  ['repetition_penalty', 1],
  ['presence_penalty', 0],
  ['frequency_penalty', 0],
] as const

function needsBeams(param: string): LatticeError {
  return wrong(param, "needs 'use_beam_search'.")
}

function wrong(param: string, what: string, code: ErrorCode = 'invalid_request'): LatticeError {
  return new LatticeError(code, `'${param}' ${what}`, { details: { param } })
}
