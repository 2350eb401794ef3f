// Owns the prompts of a completion: text or token ids, one or several.

import type { EngineModel } from '../../engine/api.ts'
import { LatticeError } from '../../errors.ts'
import { MAX_CHOICES } from '../../limits.ts'
import type { Tokenizer } from '../../text/tokenizer.ts'
import { encodePrompt } from './encode.ts'

export interface Prompt {
  tokens: Int32Array
  /** What `echo` repeats. */
  text: string
}

/**
 * The prompts in the order given: a string, strings, token ids, or lists of token ids.
 * A completion's prompt is all the model sees, so special tokens' text counts as special.
 * @throws LatticeError `invalid_request` with details.param
 */
export function parsePrompts(value: unknown, tokenizer: Tokenizer, model: EngineModel): Prompt[] {
  if (value === undefined || value === null) throw wrong('is missing', 'prompt')
  if (typeof value === 'string') return [textPrompt(value, tokenizer, model, 'prompt')]
  if (!Array.isArray(value) || value.length === 0) throw wrong(SHAPES, 'prompt')
  if (typeof value[0] === 'number') return [tokenPrompt(value, tokenizer, model, 'prompt')]
  if (value.length > MAX_CHOICES) throw wrong(`must have at most ${MAX_CHOICES} prompts`, 'prompt')
  return value.map((item: unknown, i) => {
    const param = `prompt[${i}]`
    if (typeof item === 'string') return textPrompt(item, tokenizer, model, param)
    if (Array.isArray(item)) return tokenPrompt(item, tokenizer, model, param)
    throw wrong(SHAPES, 'prompt')
  })
}

/** @throws LatticeError `invalid_request` unless each is an id of the vocabulary. */
export function tokenIds(value: readonly unknown[], model: EngineModel, param: string): Int32Array {
  const tokens = new Int32Array(value.length)
  for (let i = 0; i < value.length; i++) {
    const token = value[i]
    if (!Number.isInteger(token) || (token as number) < 0 || (token as number) >= model.vocabSize) {
      throw wrong(`must hold token ids from 0 to ${model.vocabSize - 1}`, param)
    }
    tokens[i] = token as number
  }
  return tokens
}

const SHAPES = 'must be a string, a list of strings, a list of token ids, or a list of such lists'

function textPrompt(text: string, tokenizer: Tokenizer, model: EngineModel, param: string): Prompt {
  const tokens = encodePrompt(text, true, tokenizer, model, param)
  if (tokens.length === 0) throw wrong('is empty: there is no token to start from', param)
  return { tokens, text }
}

function tokenPrompt(
  value: readonly unknown[],
  tokenizer: Tokenizer,
  model: EngineModel,
  param: string,
): Prompt {
  const tokens = tokenIds(value, model, param)
  if (tokens.length === 0) throw wrong('is empty: there is no token to start from', param)
  return { tokens, text: tokenizer.decode(tokens) }
}

function wrong(what: string, param: string): LatticeError {
  return new LatticeError('invalid_request', `'${param}' ${what}.`, { details: { param } })
}
