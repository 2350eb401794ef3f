// Owns POST /tokenize and /detokenize: a model's tokens without running it, in vLLM's shapes.

import { z } from 'zod'
import { LatticeError } from '../errors.ts'
import { readJson } from './body.ts'
import type { RouteContext, ServerContext } from './context.ts'
import { chatPrompt, templateExtra } from './openai/chat-prompt.ts'
import { messagesField, toolsField } from './openai/messages.ts'
import { checkModel } from './openai/parameters.ts'
import { tokenIds } from './openai/prompt.ts'
import { boolean, optional, parseParameters, string } from './validate.ts'

const tokenizeParameters = z.strictObject({
  model: optional(string),
  prompt: optional(string),
  messages: optional(messagesField),
  add_special_tokens: optional(boolean),
  add_generation_prompt: optional(boolean),
  return_token_strs: optional(boolean),
  tools: optional(toolsField),
  chat_template_kwargs: optional(templateExtra),
})
type TokenizeParameters = z.infer<typeof tokenizeParameters>

const detokenizeParameters = z.strictObject({
  model: optional(string),
  tokens: z.array(z.unknown()),
})

/** Exactly what /v1/completions (prompt) or /v1/chat/completions (messages) would feed in. */
export function tokenize(context: ServerContext) {
  return async (c: RouteContext): Promise<Response> => {
    const parameters = parseParameters(tokenizeParameters, await readJson(c))
    const { model } = context.engine
    checkModel(parameters.model, model)
    const tokens = [...encode(context, parameters)]
    return c.json({
      count: tokens.length,
      max_model_len: model.contextLength,
      tokens,
      token_strs: parameters.return_token_strs
        ? tokens.map((token) => context.tokenizer.tokenText(token))
        : null,
    })
  }
}

export function detokenize(context: ServerContext) {
  return async (c: RouteContext): Promise<Response> => {
    const parameters = parseParameters(detokenizeParameters, await readJson(c))
    const { model } = context.engine
    checkModel(parameters.model, model)
    const tokens = tokenIds(parameters.tokens, model, 'tokens')
    return c.json({ prompt: context.tokenizer.decode(tokens) })
  }
}

function encode(context: ServerContext, parameters: TokenizeParameters): Int32Array {
  const { prompt, messages } = parameters
  if (prompt !== undefined && messages === undefined) {
    const chatOnly = (['add_generation_prompt', 'tools', 'chat_template_kwargs'] as const).find(
      (name) => parameters[name] !== undefined,
    )
    if (chatOnly) throw wrong(chatOnly, "needs 'messages'.")
    const addSpecial = parameters.add_special_tokens ?? true
    return context.tokenizer.encode(prompt, { addSpecial, parseSpecial: true })
  }
  if (messages !== undefined && prompt === undefined) {
    return chatPrompt(context, messages, {
      tools: parameters.tools,
      extra: parameters.chat_template_kwargs,
      addGenerationPrompt: parameters.add_generation_prompt ?? true,
      addSpecial: parameters.add_special_tokens ?? false,
    })
  }
  throw wrong('prompt', "or 'messages' must be given, and not both.")
}

function wrong(param: string, what: string): LatticeError {
  return new LatticeError('invalid_request', `'${param}' ${what}`, { details: { param } })
}
