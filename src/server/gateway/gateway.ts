// Owns the gateway: an HTTP server that answers OpenAI's API by asking another machine over
// datagrams. A large body, or one that waits for "100 Continue", is not read before the server has
// room for it: of a refused prompt hardly a byte is sent.
//
//   asked before the body: for as many bytes as Content-Length says and --max-tokens tokens, by
//   load alone; after it: for what it really is, and where its prefix is in memory.

import { randomUUID } from 'node:crypto'
import { createServer, type Server as HttpServer, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { getRequestListener } from '@hono/node-server'
import { Hono, type Next } from 'hono'
import { LatticeError } from '../../errors.ts'
import type { LatticeClient } from '../../net/client.ts'
import type { ClientExchange } from '../../net/client-exchange.ts'
import type { Tokenizer } from '../../text/tokenizer.ts'
import { authenticator } from '../auth.ts'
import { checkHead, readJson } from '../body.ts'
import type { RouteContext, RouteEnv } from '../context.ts'
import { errorResponse } from '../errors.ts'
import { livez } from '../health.ts'
import { answerStream, answerWhole } from '../openai/answer.ts'
import { ChatDocument, ChatFrames } from '../openai/chat-answer.ts'
import { CompletionDocument, CompletionFrames } from '../openai/completion-answer.ts'
import { type Forwarded, readChat, readCompletion } from './parameters.ts'
import { asHttp, GatewayRun } from './run.ts'

export interface GatewayOptions {
  client: LatticeClient
  host: string
  /** 0 takes any free port. */
  port: number
  /** None lets everyone in. */
  apiKeys: readonly string[]
  /** Output tokens of a chat that does not say, and the most of one asked for before its body. */
  maxTokens: number
  /** A body of more bytes is asked for before it is read. */
  readFirstBytes: number
}

export interface Gateway {
  readonly url: string
  close(): Promise<void>
}

/** Log-probabilities are refused, so no token is ever looked at. */
const NO_TOKENIZER = { detokenizer: () => ({}) } as unknown as Tokenizer

/** @throws LatticeError `usage` if the address cannot be listened on */
export async function startGateway(options: GatewayOptions): Promise<Gateway> {
  const app = createGateway(options)
  const listener = getRequestListener(app.fetch, { hostname: options.host })
  const http = createServer({ requireHostHeader: false }, listener)
  // Else Node would say "continue" to all of them.
  http.on('checkContinue', listener)
  await listen(http, options)
  const { address, family, port } = http.address() as AddressInfo
  return {
    url: `http://${family === 'IPv6' ? `[${address}]` : address}:${port}`,
    async close() {
      const closed = new Promise<void>((resolve) => http.once('close', () => resolve()))
      http.close()
      http.closeAllConnections()
      await closed
    },
  }
}

function createGateway(options: GatewayOptions): Hono<RouteEnv> {
  const auth = authenticator(options.apiKeys)
  const app = new Hono<RouteEnv>()
  app.use(async (c: RouteContext, next: Next): Promise<void> => {
    const requestId = randomUUID().replaceAll('-', '')
    c.set('requestId', requestId)
    c.header('X-Request-Id', requestId)
    auth.tenant(c.req.path, c.req.header('authorization'))
    await next()
  })
  app.get('/livez', livez)
  app.post('/v1/chat/completions', (c) => forward(options, c, 'chat'))
  app.post('/v1/completions', (c) => forward(options, c, 'completion'))
  app.notFound((c) => {
    const what = `There is no ${c.req.method.slice(0, 20)} ${c.req.path.slice(0, 100)}.`
    const todo = 'A gateway has POST /v1/chat/completions, POST /v1/completions and GET /livez.'
    return refusal(c, new LatticeError('not_found', what, { todo }))
  })
  app.onError((error, c) => refusal(c, error))
  return app
}

async function forward(
  options: GatewayOptions,
  c: RouteContext,
  kind: 'chat' | 'completion',
): Promise<Response> {
  const gone = new AbortController()
  c.req.raw.signal.addEventListener('abort', () => gone.abort(), { once: true })
  let exchange = await askEarly(options, c, gone.signal)
  try {
    const outgoing = c.env.outgoing as ServerResponse | undefined
    if (expectsContinue(c)) outgoing?.writeContinue()
    const body = await readJson(c)
    const asked = kind === 'chat' ? readChat(body, options.maxTokens) : readCompletion(body)
    // What was asked for without knowing the body is not what the body asks for.
    const differs = asked.model !== undefined || asked.prompt.maxTokens > options.maxTokens
    if (differs) exchange?.close()
    if (differs || !exchange) exchange = await reserve(options, asked, gone.signal)
    const run = new GatewayRun(c.get('requestId'), exchange, asked.prompt, gone)
    if (asked.stream) await run.begin()
    return kind === 'chat' ? answerChat(c, run, asked) : answerCompletion(c, run, asked)
  } catch (thrown) {
    exchange?.close()
    throw thrown
  }
}

function answerChat(c: RouteContext, run: GatewayRun, asked: Forwarded) {
  const { model = 'default', includeUsage } = asked
  const id = `chatcmpl-${run.requestId}`
  const shape = { id, model, choices: 1, logprobs: false, tools: false, includeUsage }
  if (asked.stream) return answerStream(c, run, new ChatFrames(shape, NO_TOKENIZER))
  return answerWhole(c, run, new ChatDocument(shape, NO_TOKENIZER))
}

function answerCompletion(c: RouteContext, run: GatewayRun, asked: Forwarded) {
  const { model = 'default', includeUsage } = asked
  const shape = {
    id: `cmpl-${run.requestId}`,
    model,
    logprobs: undefined,
    echoes: [''],
    includeUsage,
  }
  if (asked.stream) return answerStream(c, run, new CompletionFrames(shape, NO_TOKENIZER))
  return answerWhole(c, run, new CompletionDocument(shape, NO_TOKENIZER))
}

/** Asks before the body is read; undefined if that can wait until it is. */
async function askEarly(
  { client, maxTokens, readFirstBytes }: GatewayOptions,
  c: RouteContext,
  signal: AbortSignal,
): Promise<ClientExchange | undefined> {
  const promptBytes = Number(c.req.header('content-length') ?? NaN)
  try {
    checkHead(c)
    if (!(promptBytes > readFirstBytes || (promptBytes > 0 && expectsContinue(c)))) return undefined
    return await client.reserve({ promptBytes, maxTokens, signal })
  } catch (thrown) {
    // The body is on its way and nobody will read it.
    c.header('Connection', 'close')
    throw asHttp(thrown)
  }
}

async function reserve(
  { client }: GatewayOptions,
  { model, prompt }: Forwarded,
  signal: AbortSignal,
): Promise<ClientExchange> {
  const { bytes, maxTokens } = prompt
  const named = model === undefined ? {} : { model }
  try {
    return await client.reserve({ promptBytes: bytes.length, maxTokens, signal, ...named }, prompt)
  } catch (thrown) {
    throw asHttp(thrown)
  }
}

function expectsContinue(c: RouteContext): boolean {
  return c.req.header('expect')?.toLowerCase() === '100-continue'
}

/** The error's answer, with the time that the server named. */
function refusal(c: RouteContext, thrown: unknown): Response {
  const response = errorResponse(c, thrown)
  const ms = thrown instanceof LatticeError ? Number(thrown.details['retryAfterMs'] ?? 0) : 0
  if (ms > 0) response.headers.set('Retry-After', String(Math.ceil(ms / 1000)))
  return response
}

async function listen(http: HttpServer, { host, port }: GatewayOptions): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<void>()
  http.once('error', reject)
  http.listen(port, host, resolve)
  try {
    await promise
  } catch (cause) {
    const why = cause instanceof Error ? cause.message : String(cause)
    throw new LatticeError('usage', `Cannot listen on ${host}:${port}: ${why}.`, {
      todo: 'Choose another address with --listen.',
      cause,
    })
  }
  http.off('error', reject)
}
