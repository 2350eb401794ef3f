// Owns POST /v1/completions: prompts as they are → run → answer, its choices in the prompts' order.

import { z } from 'zod'
import { LatticeError } from '../../errors.ts'
import { MAX_CHOICES, MAX_TOP_LOGPROBS } from '../../limits.ts'
import { readJson } from '../body.ts'
import type { RouteContext, ServerContext } from '../context.ts'
import { boolean, integer, optional, parseParameters, unsupported } from '../validate.ts'
import { answerStream, answerWhole } from './answer.ts'
import { CompletionDocument, CompletionFrames, type CompletionShape } from './completion-answer.ts'
import { checkModel, fitMaxTokens, samplingOf, sharedFields } from './parameters.ts'
import { parsePrompts, type Prompt } from './prompt.ts'
import { Run } from './run.ts'
import { selectionOf } from './selection.ts'

/** OpenAI's default. */
const MAX_TOKENS_DEFAULT = 16

export const completionFields = {
  ...sharedFields,
  prompt: z.unknown().optional(),
  logprobs: optional(integer(0, MAX_TOP_LOGPROBS)),
  echo: optional(boolean),
  suffix: unsupported('Text is only continued at its end.'),
}

const completionParameters = z.strictObject(completionFields)
type CompletionParameters = z.infer<typeof completionParameters>

export function completions(context: ServerContext) {
  return async (c: RouteContext): Promise<Response> => {
    const parameters = parseParameters(completionParameters, await readJson(c))
    const { tokenizer, engine } = context
    checkModel(parameters.model, engine.model)
    checkCombinations(parameters)
    const prompts = parsePrompts(parameters.prompt, tokenizer, engine.model)
    const run = startRun(context, c, parameters, prompts)
    const shape: CompletionShape = {
      id: `cmpl-${run.requestId}`,
      model: engine.model.id,
      logprobs: parameters.logprobs,
      echoes: choiceEchoes(parameters, prompts),
      includeUsage: parameters.stream_options?.include_usage ?? false,
    }
    if (!parameters.stream) return answerWhole(c, run, new CompletionDocument(shape, tokenizer))
    return answerStream(c, run, new CompletionFrames(shape, tokenizer))
  }
}

function startRun(
  context: ServerContext,
  c: RouteContext,
  parameters: CompletionParameters,
  prompts: readonly Prompt[],
): Run {
  const { model } = context.engine
  const { bestOf, choices, ...selection } = selectionOf(parameters)
  if (prompts.length * bestOf > MAX_CHOICES) {
    throw wrong(
      bestOf > choices ? 'best_of' : 'n',
      `times the number of prompts is over ${MAX_CHOICES}.`,
    )
  }
  const request = {
    ...selection,
    choices,
    bestOf,
    sampling: samplingOf(parameters, model),
    stop: parameters.stop ?? [],
    ignoreEos: parameters.ignore_eos ?? false,
    topLogprobs: parameters.logprobs,
  }
  const sized = prompts.map(({ tokens }) => ({
    tokens,
    maxTokens: fitMaxTokens(
      parameters.max_tokens,
      MAX_TOKENS_DEFAULT,
      tokens.length,
      model,
      'prompt',
    ),
  }))
  return new Run(context, c, request, sized)
}

function checkCombinations(parameters: CompletionParameters): void {
  if (parameters.echo && parameters.logprobs !== undefined) {
    throw new LatticeError('unsupported_parameter', "'echo' with 'logprobs' is not supported.", {
      todo: 'Prompt tokens have no logprobs here: leave one of the two out.',
      details: { param: 'echo' },
    })
  }
  if (parameters.stream_options !== undefined && !parameters.stream) {
    throw wrong('stream_options', "needs 'stream' to be true.")
  }
}

/** The text each choice starts with: its prompt, or nothing. */
function choiceEchoes(parameters: CompletionParameters, prompts: readonly Prompt[]): string[] {
  const choices = parameters.n ?? 1
  return prompts.flatMap(({ text }) =>
    Array.from({ length: choices }, () => (parameters.echo ? text : '')),
  )
}

function wrong(param: string, what: string): LatticeError {
  return new LatticeError('invalid_request', `'${param}' ${what}`, { details: { param } })
}
