// Owns /v1/prefixes: prompts' beginnings that a tenant keeps in memory, so that every later prompt
// with such a beginning computes only the rest.

import { createHash } from 'node:crypto'
import { z } from 'zod'
import { type EngineModel, GREEDY, type PinnedPrefix, type SequenceRequest } from '../engine/api.ts'
import { LatticeError } from '../errors.ts'
import { readJson } from './body.ts'
import { askEngine, type RouteContext, type ServerContext } from './context.ts'
import { chatPrompt, templateExtra } from './openai/chat-prompt.ts'
import { messagesField, toolsField } from './openai/messages.ts'
import { checkModel } from './openai/parameters.ts'
import { parsePrompts } from './openai/prompt.ts'
import { optional, parseParameters, string } from './validate.ts'

const pinParameters = z.strictObject({
  model: optional(string),
  prompt: z.unknown().optional(),
  messages: optional(messagesField),
  tools: optional(toolsField),
  chat_template_kwargs: optional(templateExtra),
})
type PinParameters = z.infer<typeof pinParameters>

/** Hex digits of the SHA-256 of a prefix's tokens that name it: the same tokens, the same name. */
const ID_DIGITS = 16

/** Computes a prefix, or finds it, and keeps it. Once more for the same changes nothing. */
export function pinPrefix(context: ServerContext) {
  return async (c: RouteContext): Promise<Response> => {
    const parameters = parseParameters(pinParameters, await readJson(c))
    checkModel(parameters.model, context.engine.model)
    const prompt = prefixTokens(context, parameters)
    const tenant = c.get('tenant')
    const pin = nameOf(prompt)
    const request = { requestId: c.get('requestId'), tenant, prompt, pin }
    const cachedTokens = await compute(context, c, request)
    const pinned = await pinnedPrefixes(context, tenant)
    const found = pinned.find(({ id }) => id === pin)
    if (!found) throw gone(pin)
    return c.json({ ...prefixJson(found), cached_tokens: cachedTokens }, 201)
  }
}

export function listPrefixes(context: ServerContext) {
  return async (c: RouteContext): Promise<Response> => {
    const data = (await pinnedPrefixes(context, c.get('tenant'))).map(prefixJson)
    return c.json({ object: 'list', data })
  }
}

export function unpinPrefix(context: ServerContext) {
  return async (c: RouteContext): Promise<Response> => {
    const id = c.req.param('id') ?? ''
    const question = { kind: 'unpin', tenant: c.get('tenant'), id } as const
    if (!(await askEngine(context.engine.ask(question)))) throw gone(id)
    return c.json({ id, object: 'prefix', deleted: true })
  }
}

function pinnedPrefixes({ engine }: ServerContext, tenant: string): Promise<PinnedPrefix[]> {
  return askEngine(engine.ask({ kind: 'pinned', tenant }))
}

function prefixTokens(context: ServerContext, parameters: PinParameters): Int32Array {
  const { prompt, messages, tools, chat_template_kwargs: extra } = parameters
  if ((prompt === undefined) === (messages === undefined)) {
    throw wrong('prompt', "or 'messages' must be given, and not both.")
  }
  if (messages !== undefined) {
    return chatPrompt(context, messages, { tools, extra, addGenerationPrompt: false })
  }
  if (tools !== undefined) throw wrong('tools', "needs 'messages'.")
  if (extra !== undefined) throw wrong('chat_template_kwargs', "needs 'messages'.")
  const [first, second] = parsePrompts(prompt, context.tokenizer, context.engine.model)
  if (!first || second) throw wrong('prompt', 'must be one prompt.')
  return first.tokens
}

/**
 * Runs the prefix as a prompt with one token of output, which nobody reads.
 * @returns how many of its tokens were in memory already
 */
function compute(
  { engine }: ServerContext,
  c: RouteContext,
  request: Pick<SequenceRequest, 'requestId' | 'tenant' | 'prompt' | 'pin'>,
): Promise<number> {
  checkRoom(request.prompt, engine.model)
  return new Promise((resolve, reject) => {
    let cached = 0
    const handle = engine.submit(
      { ...request, sampling: GREEDY, maxTokens: 1, stopTokens: [], topLogprobs: undefined },
      {
        onStart: (cachedTokens) => void (cached = cachedTokens),
        onToken: () => {},
        onFinish: (reason, _count, error) => {
          if (error) reject(error)
          else if (reason === 'abort') reject(new LatticeError('engine_stopped', 'It was ended.'))
          else resolve(cached)
        },
      },
    )
    c.req.raw.signal.addEventListener('abort', () => handle.abort(), { once: true })
  })
}

/** It is computed as a request of one output token is. */
function checkRoom({ length }: Int32Array, { contextLength }: EngineModel): void {
  if (length < contextLength) return
  throw new LatticeError(
    'context_length_exceeded',
    `The prefix has ${length} tokens; the context holds ${contextLength}, an answer included.`,
    { todo: 'Shorten the prefix.' },
  )
}

function nameOf(tokens: Int32Array): string {
  const bytes = new Uint8Array(tokens.buffer, tokens.byteOffset, tokens.byteLength)
  return `prefix-${createHash('sha256').update(bytes).digest('hex').slice(0, ID_DIGITS)}`
}

function prefixJson({ id, tokens, pages, bytes, uses, ageMs }: PinnedPrefix): object {
  return { id, object: 'prefix', tokens, pages, bytes, uses, age_ms: Math.round(ageMs) }
}

function gone(id: string): LatticeError {
  return new LatticeError('not_found', `No prefix ${id.slice(0, 40)} is pinned.`, {
    todo: 'GET /v1/prefixes lists yours.',
  })
}

function wrong(param: string, what: string): LatticeError {
  return new LatticeError('invalid_request', `'${param}' ${what}`, { details: { param } })
}
