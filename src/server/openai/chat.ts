// Owns POST /v1/chat/completions: parameters → prompt by the chat template → run → answer.

import { z } from 'zod'
import { LatticeError } from '../../errors.ts'
import { MAX_TOP_LOGPROBS } from '../../limits.ts'
import { readJson } from '../body.ts'
import type { RouteContext, ServerContext } from '../context.ts'
import {
  boolean,
  integer,
  optional,
  parseParameters,
  record,
  refuse,
  unsupported,
} from '../validate.ts'
import { answerStream, answerWhole } from './answer.ts'
import { ChatDocument, ChatFrames, type ChatShape } from './chat-answer.ts'
import { chatPrompt, templateExtra } from './chat-prompt.ts'
import { type ChatTool, messagesField, toolsField } from './messages.ts'
import { checkModel, fitMaxTokens, samplingOf, sharedFields } from './parameters.ts'
import { Run } from './run.ts'
import { selectionOf } from './selection.ts'

const INT32_MAX = 2 ** 31 - 1

const toolChoice = z.unknown().transform((value, ctx): 'auto' | 'none' => {
  if (value === 'auto' || value === 'none') return value
  const what = 'can only be "auto" or "none": output is not constrained to a call.'
  refuse(ctx, 'unsupported_parameter', what)
  return 'auto'
})

const responseFormat = record.superRefine(({ type, ...rest }, ctx) => {
  const what = 'can only be {"type": "text"}: output is not constrained to a format.'
  if (type !== 'text') refuse(ctx, 'unsupported_parameter', what)
  const alien = Object.keys(rest)[0]
  if (alien) refuse(ctx, 'unknown_parameter', 'is not a field of the text format.', [alien])
})

export const chatFields = {
  ...sharedFields,
  messages: messagesField,
  max_completion_tokens: optional(integer(1, INT32_MAX)),
  logprobs: optional(boolean),
  top_logprobs: optional(integer(0, MAX_TOP_LOGPROBS)),
  tools: optional(toolsField),
  tool_choice: optional(toolChoice),
  parallel_tool_calls: unsupported('The model decides how many calls it makes.', true),
  response_format: optional(responseFormat),
  chat_template_kwargs: optional(templateExtra),
  modalities: unsupported('The answer is text.', ['text']),
  audio: unsupported('The answer is text.'),
  functions: unsupported('Use tools.'),
  function_call: unsupported('Use tool_choice.'),
  reasoning_effort: unsupported('Use chat_template_kwargs if the model’s template has a switch.'),
  verbosity: unsupported('Say it in a message.'),
  prediction: unsupported('Leave it out.'),
  web_search_options: unsupported('Leave it out.'),
  prompt_cache_retention: unsupported('Pin a prompt with POST /v1/prefixes.'),
  moderation: unsupported('Leave it out.'),
}

const chatParameters = z.strictObject(chatFields)
type ChatParameters = z.infer<typeof chatParameters>

export function chat(context: ServerContext) {
  return async (c: RouteContext): Promise<Response> => {
    const parameters = parseParameters(chatParameters, await readJson(c))
    checkModel(parameters.model, context.engine.model)
    const run = startRun(context, c, parameters)
    const shape: ChatShape = {
      id: `chatcmpl-${run.requestId}`,
      model: context.engine.model.id,
      choices: run.choices,
      logprobs: parameters.logprobs ?? false,
      tools: activeTools(parameters) !== undefined,
      includeUsage: parameters.stream_options?.include_usage ?? false,
    }
    if (!parameters.stream) return answerWhole(c, run, new ChatDocument(shape, context.tokenizer))
    return answerStream(c, run, new ChatFrames(shape, context.tokenizer))
  }
}

function startRun(context: ServerContext, c: RouteContext, parameters: ChatParameters): Run {
  const { model } = context.engine
  checkCombinations(parameters)
  const tokens = chatPrompt(context, parameters.messages, {
    tools: activeTools(parameters),
    extra: parameters.chat_template_kwargs,
  })
  const asked = parameters.max_completion_tokens ?? parameters.max_tokens
  const maxTokens = fitMaxTokens(asked, INT32_MAX, tokens.length, model, 'messages')
  const request = {
    ...selectionOf(parameters),
    sampling: samplingOf(parameters, model),
    stop: parameters.stop ?? [],
    ignoreEos: parameters.ignore_eos ?? false,
    topLogprobs: parameters.logprobs ? (parameters.top_logprobs ?? 0) : undefined,
  }
  return new Run(context, c, request, [{ tokens, maxTokens }])
}

function checkCombinations(parameters: ChatParameters): void {
  const { max_tokens: old, max_completion_tokens: limit } = parameters
  if (parameters.top_logprobs !== undefined && !parameters.logprobs) {
    throw wrong('top_logprobs', "needs 'logprobs' to be true.")
  }
  if (old !== undefined && limit !== undefined && old !== limit) {
    throw wrong('max_tokens', "differs from 'max_completion_tokens'; send one of them.")
  }
  if (parameters.stream_options !== undefined && !parameters.stream) {
    throw wrong('stream_options', "needs 'stream' to be true.")
  }
  if (parameters.tool_choice !== undefined && parameters.tools === undefined) {
    throw wrong('tool_choice', "needs 'tools'.")
  }
}

/** With tool_choice 'none' the model is not told of any tool, so it cannot call one. */
function activeTools(parameters: ChatParameters): ChatTool[] | undefined {
  if (parameters.tool_choice === 'none' || parameters.tools?.length === 0) return undefined
  return parameters.tools
}

function wrong(param: string, what: string): LatticeError {
  return new LatticeError('invalid_request', `'${param}' ${what}`, { details: { param } })
}
