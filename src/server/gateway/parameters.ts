// Owns what of OpenAI's API the datagram protocol carries: the rest is refused by name.

import { z } from 'zod'
import type { ClientPrompt } from '../../net/client-exchange.ts'
import { MAX_TOKENS_MAX } from '../../net/protocol.ts'
import { LatticeError } from '../../errors.ts'
import { chatFields } from '../openai/chat.ts'
import { templateMessages } from '../openai/messages.ts'
import { sharedFields } from '../openai/parameters.ts'
import { integer, optional, parseParameters, refuse, string, unsupported } from '../validate.ts'

const NOT_CARRIED = 'The datagram protocol does not carry it; ask the server itself over HTTP.'
/** OpenAI's default for plain completions. */
const COMPLETION_TOKENS = 16

const carriedFields = {
  ...sharedFields,
  max_tokens: optional(integer(1, MAX_TOKENS_MAX)),
  seed: optional(integer(0, Number.MAX_SAFE_INTEGER)),
  n: unsupported(NOT_CARRIED, 1),
  top_k: unsupported(NOT_CARRIED, 0, -1),
  min_p: unsupported(NOT_CARRIED, 0),
  typical_p: unsupported(NOT_CARRIED, 1),
  repetition_penalty: unsupported(NOT_CARRIED, 1),
  presence_penalty: unsupported(NOT_CARRIED, 0),
  frequency_penalty: unsupported(NOT_CARRIED, 0),
  logit_bias: unsupported(NOT_CARRIED, {}),
  stop: unsupported(NOT_CARRIED, []),
  ignore_eos: unsupported(NOT_CARRIED, false),
}

const chatParameters = z.strictObject({
  ...chatFields,
  ...carriedFields,
  max_completion_tokens: optional(integer(1, MAX_TOKENS_MAX)),
  logprobs: unsupported(NOT_CARRIED, false),
  top_logprobs: unsupported(NOT_CARRIED, 0),
  tools: unsupported(NOT_CARRIED, []),
  tool_choice: unsupported(NOT_CARRIED, 'none', 'auto'),
  chat_template_kwargs: unsupported(NOT_CARRIED, {}),
})

const completionParameters = z.strictObject({
  ...carriedFields,
  prompt: string.transform((prompt, ctx) => {
    if (prompt === '') refuse(ctx, 'invalid_request', 'must not be empty.')
    return prompt
  }),
  logprobs: unsupported(NOT_CARRIED),
  echo: unsupported(NOT_CARRIED, false),
  best_of: unsupported(NOT_CARRIED, 1),
  suffix: unsupported(NOT_CARRIED),
})

/** A request's body as the datagram path takes it. */
export interface Forwarded {
  prompt: ClientPrompt
  /** As the client named it. */
  model: string | undefined
  stream: boolean
  includeUsage: boolean
}

type Shared = Pick<
  z.infer<typeof completionParameters>,
  'model' | 'stream' | 'stream_options' | 'temperature' | 'top_p' | 'seed'
>

/**
 * @param maxTokens output tokens of a request that does not say
 * @throws LatticeError as `parseParameters` does
 */
export function readChat(body: Record<string, unknown>, maxTokens: number): Forwarded {
  const parameters = parseParameters(chatParameters, body)
  const { max_tokens: old, max_completion_tokens: limit } = parameters
  if (old !== undefined && limit !== undefined && old !== limit) {
    throw wrong('max_tokens', "differs from 'max_completion_tokens'; send one of them.")
  }
  const messages = templateMessages(parameters.messages).map((message, i) => {
    const { role, content, ...rest } = message
    const alien = Object.keys(rest)[0]
    if (alien) throw notCarried(`messages[${i}].${alien}`)
    return { role, content }
  })
  return forwarded(parameters, JSON.stringify(messages), true, limit ?? old ?? maxTokens)
}

/** @throws LatticeError as `parseParameters` does */
export function readCompletion(body: Record<string, unknown>): Forwarded {
  const parameters = parseParameters(completionParameters, body)
  const { prompt, max_tokens: maxTokens } = parameters
  return forwarded(parameters, prompt, false, maxTokens ?? COMPLETION_TOKENS)
}

function forwarded(shared: Shared, text: string, isChat: boolean, maxTokens: number): Forwarded {
  const { model, stream = false, stream_options: options, seed } = shared
  if (options !== undefined && !stream) {
    throw wrong('stream_options', "needs 'stream' to be true.")
  }
  const prompt = {
    bytes: Buffer.from(text),
    isChat,
    maxTokens,
    temperature: shared.temperature ?? 1,
    // 0 on the wire is off; OpenAI's 0 keeps the likeliest token alone.
    topP: shared.top_p === 0 ? 2 ** -20 : (shared.top_p ?? 1),
    ...(seed === undefined ? {} : { seed }),
  }
  return { prompt, model, stream, includeUsage: options?.include_usage ?? false }
}

function wrong(param: string, what: string): LatticeError {
  return new LatticeError('invalid_request', `'${param}' ${what}`, { details: { param } })
}

function notCarried(param: string): LatticeError {
  return new LatticeError('unsupported_parameter', `'${param}' is not supported.`, {
    todo: NOT_CARRIED,
    details: { param },
  })
}
