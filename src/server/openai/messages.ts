// Owns a chat's messages: what each role may carry, and the plain form that templates take.

import { z } from 'zod'
import type { ChatMessage as TemplateMessage } from '../../text/chat-template.ts'
import { optional, record, refuse, string, unsupported } from '../validate.ts'

type Refinement = z.core.$RefinementCtx<unknown>

/** Text, or parts of text joined by a newline. Images and sound are refused by their part. */
const text = z.unknown().transform((content, ctx): string => {
  if (typeof content === 'string') return content
  if (!Array.isArray(content) || content.length === 0) {
    refuse(ctx, 'invalid_request', 'must be a string or a list of text parts.')
    return ''
  }
  return content.map((part: unknown, i) => partText(part, i, ctx)).join('\n')
})

function partText(part: unknown, i: number, ctx: Refinement): string {
  const { type, text: value, ...rest } = (part ?? {}) as Record<string, unknown>
  const alien = Object.keys(rest)[0]
  if (typeof type !== 'string') {
    refuse(ctx, 'invalid_request', 'must be "text".', [i, 'type'])
  } else if (type !== 'text') {
    const what = `is "${type.slice(0, 40)}", which is not supported. Send text parts only.`
    refuse(ctx, 'unsupported_parameter', what, [i, 'type'])
  } else if (typeof value !== 'string') {
    refuse(ctx, 'invalid_request', 'must be a string.', [i, 'text'])
  } else if (alien !== undefined) {
    refuse(ctx, 'unknown_parameter', 'is not a field of a text part.', [i, alien])
  } else return value
  return ''
}

/** Clients send arguments as JSON text; templates want the object. */
const callArguments = string.transform((source, ctx): Record<string, unknown> => {
  try {
    const value: unknown = source.trim() === '' ? {} : JSON.parse(source)
    if (typeof value === 'object' && value !== null && !Array.isArray(value)) {
      return value as Record<string, unknown>
    }
  } catch {
    // Said below, with what is not an object.
  }
  refuse(ctx, 'invalid_request', 'must be the JSON text of an object.')
  return {}
})

const toolCall = z.strictObject({
  id: string,
  type: z.literal('function'),
  function: z.strictObject({ name: string, arguments: callArguments }),
})

const system = { content: text, name: optional(string) }

const message = z.discriminatedUnion('role', [
  z.strictObject({ role: z.literal('system'), ...system }),
  z.strictObject({ role: z.literal('developer'), ...system }),
  z.strictObject({ role: z.literal('user'), content: text, name: optional(string) }),
  z.strictObject({
    role: z.literal('assistant'),
    content: optional(text).transform((value) => value ?? ''),
    name: optional(string),
    tool_calls: optional(z.array(toolCall)),
    // What a client may hand back from an answer of ours.
    refusal: unsupported('Send the text as content.'),
    annotations: unsupported('Leave it out.', []),
    audio: unsupported('Send text.'),
    function_call: unsupported('Use tool_calls.'),
  }),
  z.strictObject({
    role: z.literal('tool'),
    content: text,
    tool_call_id: string,
    name: optional(string),
  }),
])

export const messagesField = z.array(message).min(1)
export type ChatMessage = z.infer<typeof message>

const tool = z.strictObject({
  type: z.literal('function'),
  function: z.strictObject({
    name: string,
    description: optional(string),
    parameters: optional(record),
    strict: unsupported('Arguments are not constrained to the schema.', false),
  }),
})

export const toolsField = z.array(tool)
export type ChatTool = z.infer<typeof tool>

/** `developer` is OpenAI's newer name for `system`, which is what models were trained on. */
export function templateMessages(messages: readonly ChatMessage[]): TemplateMessage[] {
  return messages.map((message) => {
    const role = message.role === 'developer' ? 'system' : message.role
    return { ...withoutUndefined(message), role, content: message.content }
  })
}

export function templateTools(tools: readonly ChatTool[]): Record<string, unknown>[] {
  return tools.map((tool) => ({ type: 'function', function: withoutUndefined(tool.function) }))
}

function withoutUndefined(object: object): Record<string, unknown> {
  return Object.fromEntries(Object.entries(object).filter(([, value]) => value !== undefined))
}
