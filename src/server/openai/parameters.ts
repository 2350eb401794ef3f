// Owns the parameters that chat and completions share: their ranges, defaults and meaning.

import { randomInt } from 'node:crypto'
import { z } from 'zod'
import type { EngineModel, SamplingParams } from '../../engine/api.ts'
import { LatticeError } from '../../errors.ts'
import { MAX_CHOICES, MAX_STOP_BYTES, MAX_STOP_STRINGS } from '../../limits.ts'
import {
  boolean,
  choice,
  integer,
  number,
  optional,
  record,
  refuse,
  string,
  unsupported,
} from '../validate.ts'
import { promptTooLong } from './encode.ts'

/** Choice i samples with seed + i: the sum must stay exact. */
const SEED_MAX = 2 ** 52
const INT32_MAX = 2 ** 31 - 1

const stopStrings = z.unknown().transform((value, ctx): string[] => {
  const stops = Array.isArray(value) ? value : [value]
  if (stops.length > MAX_STOP_STRINGS) {
    refuse(ctx, 'invalid_request', `must have at most ${MAX_STOP_STRINGS} strings.`)
  }
  for (const stop of stops) {
    const bytes = typeof stop === 'string' ? Buffer.byteLength(stop) : 0
    if (bytes >= 1 && bytes <= MAX_STOP_BYTES) continue
    refuse(ctx, 'invalid_request', `must be strings of 1 to ${MAX_STOP_BYTES} bytes.`)
  }
  return stops as string[]
})

const logitBias = record.transform((bias, ctx): [number, number][] => {
  const pairs: [number, number][] = []
  for (const [token, value] of Object.entries(bias)) {
    if (!/^\d{1,9}$/.test(token)) refuse(ctx, 'invalid_request', 'must have token ids as keys.')
    else if (typeof value !== 'number' || value < -100 || value > 100) {
      refuse(ctx, 'invalid_request', 'must have values from -100 to 100.')
    } else pairs.push([Number(token), value])
  }
  return pairs
})

const earlyStopping = z.custom<boolean | 'never'>(
  (value) => typeof value === 'boolean' || value === 'never',
  { error: 'must be true, false or "never".' },
)

const metadata = record.refine(
  (value) => Object.values(value).every((entry) => typeof entry === 'string'),
  { error: 'must map strings to strings.' },
)

/** Both endpoints' fields. What OpenAI has and we have not is refused by name, unless neutral. */
export const sharedFields = {
  model: optional(string),
  stream: optional(boolean),
  stream_options: optional(
    z.strictObject({
      include_usage: optional(boolean),
      include_obfuscation: unsupported('Leave it out; nothing is padded here.', false),
    }),
  ),
  n: optional(integer(1, MAX_CHOICES)),
  best_of: optional(integer(1, MAX_CHOICES)),
  use_beam_search: optional(boolean),
  length_penalty: optional(number(-10, 10)),
  early_stopping: optional(earlyStopping),
  max_tokens: optional(integer(1, INT32_MAX)),
  temperature: optional(number(0, 2)),
  top_p: optional(number(0, 1)),
  top_k: optional(integer(-1, INT32_MAX)),
  min_p: optional(number(0, 1)),
  typical_p: optional(number(0, 1, { above: true })),
  repetition_penalty: optional(number(0, 10, { above: true })),
  presence_penalty: optional(number(-2, 2)),
  frequency_penalty: optional(number(-2, 2)),
  logit_bias: optional(logitBias),
  seed: optional(integer(-SEED_MAX, SEED_MAX)),
  stop: optional(stopStrings),
  ignore_eos: optional(boolean),
  // No effect by definition: labels and hints that OpenAI's clients send.
  user: optional(string),
  safety_identifier: optional(string),
  prompt_cache_key: optional(string),
  metadata: optional(metadata),
  service_tier: optional(choice('auto', 'default')),
  store: unsupported('Nothing is stored here.', false),
}

const shared = z.strictObject(sharedFields)
export type SharedParameters = z.infer<typeof shared>

/** OpenAI's defaults: temperature 1, top_p 1, every other step off; a drawn seed. */
export function samplingOf(parameters: SharedParameters, model: EngineModel): SamplingParams {
  const logitBias = parameters.logit_bias ?? []
  const alien = logitBias.find(([token]) => token >= model.vocabSize)
  if (alien) {
    const what = `'logit_bias' names token ${alien[0]}; the last is ${model.vocabSize - 1}.`
    throw new LatticeError('invalid_request', what, { details: { param: 'logit_bias' } })
  }
  return {
    temperature: parameters.temperature ?? (parameters.use_beam_search ? 0 : 1),
    topK: Math.max(0, parameters.top_k ?? 0),
    topP: parameters.top_p ?? 1,
    minP: parameters.min_p ?? 0,
    typicalP: parameters.typical_p ?? 1,
    repetitionPenalty: parameters.repetition_penalty ?? 1,
    presencePenalty: parameters.presence_penalty ?? 0,
    frequencyPenalty: parameters.frequency_penalty ?? 0,
    logitBias,
    seed: parameters.seed ?? randomInt(2 ** 47),
  }
}

/** @throws LatticeError `model_not_found`; without a name the one model is meant. */
export function checkModel(given: string | undefined, model: EngineModel): void {
  if (given === undefined || given === model.id) return
  throw new LatticeError('model_not_found', `The model '${given.slice(0, 200)}' is not served.`, {
    todo: `This server has '${model.id}'.`,
    details: { param: 'model' },
  })
}

/**
 * How many tokens may come: what was asked for, or `fallback` as far as the context has room.
 * @param param what the client can shorten
 * @throws LatticeError `context_length_exceeded`
 */
export function fitMaxTokens(
  asked: number | undefined,
  fallback: number,
  promptTokens: number,
  model: EngineModel,
  param: 'messages' | 'prompt',
): number {
  const room = model.contextLength - promptTokens
  if (room < 1) {
    throw promptTooLong(String(promptTokens), model.contextLength, param)
  }
  if (asked === undefined) return Math.min(fallback, room)
  if (asked <= room) return asked
  const what = `${promptTokens} prompt tokens and ${asked} more do not fit`
  const todo = `Shorten the prompt, or ask for at most ${room}.`
  throw new LatticeError(
    'context_length_exceeded',
    `${what} a context of ${model.contextLength}.`,
    {
      todo,
      details: { param: 'max_tokens' },
    },
  )
}
