// Owns the way from a conversation to the tokens that the model reads.

import { LatticeError } from '../../errors.ts'
import type { ServerContext } from '../context.ts'
import { record, refuse } from '../validate.ts'
import { encodePrompt } from './encode.ts'
import { type ChatMessage, type ChatTool, templateMessages, templateTools } from './messages.ts'

/** Names the template gets from us: a request may not put its own in their place. */
const RESERVED = new Set(['messages', 'tools', 'add_generation_prompt', 'bos_token', 'eos_token'])

export const templateExtra = record.superRefine((value, ctx) => {
  const taken = Object.keys(value).find((key) => RESERVED.has(key))
  if (taken) refuse(ctx, 'invalid_request', 'is a name the server sets.', [taken])
})

/**
 * The tokens of a conversation as the model's template writes it. The template adds its own
 * special tokens, so none are added here.
 * @throws LatticeError `template_invalid` if the model has no template or it refuses the messages,
 *   `unsupported_parameter` for tools that it would not write
 */
export function chatPrompt(
  context: ServerContext,
  messages: readonly ChatMessage[],
  options: {
    tools?: ChatTool[] | undefined
    extra?: Record<string, unknown> | undefined
    addGenerationPrompt?: boolean
    addSpecial?: boolean
  },
): Int32Array {
  if (!context.template) {
    throw new LatticeError('template_invalid', 'The model has no chat template.', {
      todo: 'Write the prompt yourself and use /v1/completions.',
    })
  }
  if (options.tools && !context.template.takesTools) {
    throw new LatticeError('unsupported_parameter', "The model's chat template knows no tools.", {
      todo: 'Leave tools out, or serve a model that was trained with some.',
      details: { param: 'tools' },
    })
  }
  const text = context.template.render(templateMessages(messages), {
    ...(options.tools ? { tools: templateTools(options.tools) } : {}),
    ...(options.extra ? { extra: options.extra } : {}),
    addGenerationPrompt: options.addGenerationPrompt ?? true,
  })
  const { tokenizer, engine } = context
  const addSpecial = options.addSpecial ?? false
  const tokens = encodePrompt(text, addSpecial, tokenizer, engine.model, 'messages')
  if (tokens.length > 0) return tokens
  throw new LatticeError('invalid_request', "'messages' make an empty prompt.", {
    details: { param: 'messages' },
  })
}
