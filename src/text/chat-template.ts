// Owns rendering a conversation to the text a model was trained on, by the model's own Jinja
// template, as Hugging Face's apply_chat_template does.

import { Environment, parse, tokenize } from '@huggingface/jinja'
import { LatticeError } from '../errors.ts'
import { JinjaInterpreter } from './jinja-interpreter.ts'
import { strftime } from './strftime.ts'

/** One part of a message's content; models here read text only. */
export interface ContentPart {
  type: string
  text?: string
}

export interface ToolCall {
  id?: string
  type?: string
  /** OpenAI's API gives `arguments` as JSON text; templates get what it says. */
  function: { name: string; arguments: unknown }
}

export interface ChatMessage {
  role: string
  content: string | null | readonly ContentPart[]
  name?: string
  tool_calls?: readonly ToolCall[]
  tool_call_id?: string
}

export interface RenderOptions {
  /** Functions the model may call, as OpenAI's API describes them; for one that takes them. */
  tools?: readonly unknown[]
  /** Ends with the opening of the assistant's turn. */
  addGenerationPrompt?: boolean
  /** More variables for the template, such as enable_thinking. */
  extra?: Record<string, unknown>
}

export interface ChatTemplate {
  /** It writes `tools`; a model whose template does not would never hear of them. */
  readonly takesTools: boolean
  /**
   * @throws LatticeError `template_invalid` if the template refuses the conversation or cannot be
   *   run, `invalid_request` for content that is not text
   */
  render(messages: readonly ChatMessage[], options?: RenderOptions): string
}

export interface TemplateContext {
  /** A second template, for conversations with tools. */
  toolUse: string | undefined
  /** bos_token, eos_token and their kin, as text. */
  tokens: Readonly<Record<string, string>>
}

type Program = object

/** How a value looks that a template wrote without turning it to text: a mistake in it. */
const UNWRITABLE = /\[object (?:Map|Object)\]/

/**
 * @param source Jinja
 * @throws LatticeError `template_invalid` if it cannot be parsed
 */
export function compileChatTemplate(source: string, context: TemplateContext): ChatTemplate {
  const plain = parseTemplate(source)
  const withTools = context.toolUse === undefined ? plain : parseTemplate(context.toolUse)
  return {
    takesTools: /\btools\b/.test(context.toolUse ?? source),
    render(messages, options = {}) {
      const program = options.tools === undefined ? plain : withTools
      const run = (structured: boolean): string =>
        runTemplate(program, {
          ...context.tokens,
          documents: null,
          ...options.extra,
          messages: messages.map((message, at) => plainMessage(message, at, structured)),
          tools: options.tools ?? null,
          add_generation_prompt: options.addGenerationPrompt ?? false,
        })
      const calls = messages.some((message) => (message.tool_calls?.length ?? 0) > 0)
      return calls ? withEitherArguments(run) : run(true)
    },
  }
}

/**
 * Most templates take a call's arguments as an object, some only as text, and neither says so:
 * those that cannot write an object get the text.
 */
function withEitherArguments(run: (structured: boolean) => string): string {
  try {
    return run(true)
  } catch (error) {
    if (!(error instanceof LatticeError) || error.code !== 'template_invalid') throw error
    try {
      return run(false)
    } catch {
      throw error
    }
  }
}

function parseTemplate(source: string): Program {
  try {
    return parse(tokenize(source, { lstrip_blocks: true, trim_blocks: true }))
  } catch (cause) {
    throw invalid(`The chat template cannot be parsed: ${messageOf(cause)}`, cause)
  }
}

function runTemplate(program: Program, variables: Record<string, unknown>): string {
  let rendered: string
  try {
    const environment = new Environment()
    for (const [name, value] of Object.entries({ ...GLOBALS, ...variables })) {
      environment.set(name, value)
    }
    rendered = String(new JinjaInterpreter(environment).run(program).value)
  } catch (cause) {
    throw invalid(`The chat template failed: ${messageOf(cause)}`, cause)
  }
  if (UNWRITABLE.test(rendered) && !UNWRITABLE.test(JSON.stringify(variables['messages']))) {
    throw invalid('The chat template writes a value that is not text.')
  }
  return rendered
}

const GLOBALS: Readonly<Record<string, unknown>> = {
  true: true,
  false: false,
  none: null,
  True: true,
  False: false,
  None: null,
  range,
  raise_exception: (message: string): never => {
    throw new Error(message)
  },
  strftime_now: (format: string): string => strftime(new Date(), format),
}

function range(start: number, stop?: number, step = 1): number[] {
  const [from, to] = stop === undefined ? [0, start] : [start, stop]
  if (step === 0) throw new Error('range() with a step of zero')
  const count = Math.max(0, Math.ceil((to - from) / step))
  if (count > 100_000) throw new Error('range() of more than 100000 numbers')
  return Array.from({ length: count }, (_, i) => from + i * step)
}

/** The message as templates expect it: text content, no keys without a value. */
function plainMessage(
  message: ChatMessage,
  at: number,
  structured: boolean,
): Record<string, unknown> {
  const plain: Record<string, unknown> = { ...message, content: plainContent(message.content, at) }
  if (message.tool_calls !== undefined) {
    plain['tool_calls'] = message.tool_calls.map((call, index) => ({
      ...call,
      function: {
        ...call.function,
        arguments: structured
          ? parsedArguments(call, `messages[${at}].tool_calls[${index}]`)
          : writtenArguments(call),
      },
    }))
  }
  return Object.fromEntries(Object.entries(plain).filter(([, value]) => value !== undefined))
}

function plainContent(content: ChatMessage['content'], at: number): string | null {
  if (content === null || content === undefined) return null
  if (typeof content === 'string') return content
  return content
    .map((part) => {
      if (part.type === 'text' && typeof part.text === 'string') return part.text
      throw new LatticeError(
        'invalid_request',
        `messages[${at}].content has a part of type "${part.type}"; this model reads text only.`,
        { todo: 'Send parts of type "text".', details: { param: 'messages' } },
      )
    })
    .join('\n')
}

function parsedArguments(call: ToolCall, at: string): unknown {
  const given = call.function.arguments
  if (typeof given !== 'string') return given
  if (given.trim() === '') return {}
  try {
    return JSON.parse(given) as unknown
  } catch (cause) {
    throw new LatticeError('invalid_request', `${at}.function.arguments is not JSON.`, {
      todo: 'Send back the arguments as the model gave them, or repair them.',
      details: { param: 'messages' },
      cause,
    })
  }
}

function writtenArguments(call: ToolCall): string {
  const given = call.function.arguments
  return typeof given === 'string' ? given : JSON.stringify(given ?? {})
}

function messageOf(cause: unknown): string {
  return cause instanceof Error ? cause.message : String(cause)
}

function invalid(what: string, cause?: unknown): LatticeError {
  return new LatticeError('template_invalid', what, {
    todo: 'Send messages in the order and roles that the model was trained on.',
    ...(cause === undefined ? {} : { cause }),
  })
}
