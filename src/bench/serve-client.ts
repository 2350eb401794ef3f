// Owns one streamed request to an OpenAI-compatible server, and when each piece of it arrived.
// Plain node:http with kept-alive connections: fetch's own work would show in the times.

import { Agent as HttpAgent, request as httpRequest, type IncomingMessage } from 'node:http'
import { Agent as HttpsAgent, request as httpsRequest } from 'node:https'
import { StringDecoder } from 'node:string_decoder'
import { LatticeError } from '../errors.ts'

/** One request's times, in milliseconds; a token's time is that of the event that carried it. */
export interface Outcome {
  ok: boolean
  /** What went wrong, if not ok. */
  error: string
  /** From the request's start to the first event with text; if none has any, to the first. */
  ttftMs: number
  /** Gaps between events with text. */
  itlsMs: number[]
  /** From the request's start to the last event of a choice (the finish is one). */
  latencyMs: number
  /** As the server counts them; undefined if it does not say. */
  promptTokens: number | undefined
  outputTokens: number | undefined
}

export interface Target {
  /** What comes before /v1, such as http://127.0.0.1:8080. */
  url: URL
  apiKey: string | undefined
  /** Longest silence of the server before a request counts as failed. */
  timeoutMs: number
}

/** Speaks JSON and server-sent events with one server. */
export class BenchClient {
  readonly #target: Target
  readonly #agent: HttpAgent | HttpsAgent
  readonly #request: typeof httpRequest

  constructor(target: Target) {
    const secure = target.url.protocol === 'https:'
    this.#target = target
    this.#agent = secure ? new HttpsAgent({ keepAlive: true }) : new HttpAgent({ keepAlive: true })
    this.#request = secure ? httpsRequest : httpRequest
  }

  /** A JSON answer. @throws LatticeError `not_found` if the server cannot be reached or refuses. */
  async json(path: string, body: unknown): Promise<unknown> {
    try {
      const response = await this.#open(path, body)
      const text = await readAll(response)
      if (response.statusCode !== 200) throw new Error(refusal(response, text))
      return JSON.parse(text)
    } catch (error) {
      throw new LatticeError('not_found', `${this.#url(path)}: ${messageOf(error)}`, {
        todo: 'Check --url, --model and --api-key.',
        cause: error,
      })
    }
  }

  /** Sends a streaming request and times its events. Never throws: failures are outcomes. */
  async stream(path: string, body: unknown): Promise<Outcome> {
    const timing = new Timing()
    try {
      const response = await this.#open(path, body)
      if (response.statusCode !== 200) {
        return timing.failed(refusal(response, await readAll(response)))
      }
      await readEvents(response, (data, now) => timing.take(data, now))
      return timing.outcome()
    } catch (error) {
      return timing.failed(messageOf(error))
    }
  }

  close(): void {
    this.#agent.destroy()
  }

  #url(path: string): URL {
    const { url } = this.#target
    return new URL(url.pathname.replace(/\/$/, '') + path, url)
  }

  /** @param body sent with POST; undefined asks with GET. */
  #open(path: string, body: unknown): Promise<IncomingMessage> {
    const { apiKey, timeoutMs } = this.#target
    const payload = body === undefined ? undefined : Buffer.from(JSON.stringify(body))
    return new Promise((resolve, reject) => {
      const request = this.#request(this.#url(path), {
        agent: this.#agent,
        method: payload === undefined ? 'GET' : 'POST',
        headers: {
          ...(payload === undefined
            ? {}
            : { 'content-type': 'application/json', 'content-length': payload.length }),
          ...(apiKey === undefined ? {} : { authorization: `Bearer ${apiKey}` }),
        },
      })
      let answer: IncomingMessage | undefined
      request.setTimeout(timeoutMs, () => {
        const stream = answer ?? request
        stream.destroy(new Error(`the server was silent for ${timeoutMs / 1000} s`))
      })
      request.on('response', (response) => {
        answer = response
        resolve(response)
      })
      request.on('error', (error: NodeJS.ErrnoException) => {
        // The server may close an idle connection at the moment it is used again.
        if (request.reusedSocket && error.code === 'ECONNRESET') {
          this.#open(path, body).then(resolve, reject)
        } else {
          reject(error)
        }
      })
      request.end(payload)
    })
  }
}

/** What a streamed answer has told so far. */
class Timing {
  readonly #start = performance.now()
  readonly #itls: number[] = []
  #firstChoice = 0
  #firstText = 0
  #lastText = 0
  #last = 0
  #ended = false
  #promptTokens: number | undefined
  #outputTokens: number | undefined

  take(data: string, now: number): void {
    if (data === '[DONE]') {
      this.#ended = true
      return
    }
    const event = JSON.parse(data) as StreamEvent
    if (event.error !== undefined) throw new Error(errorText(event.error))
    if (event.usage) {
      this.#promptTokens = event.usage.prompt_tokens
      this.#outputTokens = event.usage.completion_tokens
    }
    const choice = event.choices?.[0]
    if (choice === undefined) return
    this.#last = now
    if (choice.finish_reason) this.#ended = true
    if (this.#firstChoice === 0) this.#firstChoice = now
    if (!hasText(choice)) return
    if (this.#firstText === 0) this.#firstText = now
    else this.#itls.push(now - this.#lastText)
    this.#lastText = now
  }

  outcome(): Outcome {
    if (this.#firstChoice === 0) return this.failed('the stream had no choice in it')
    if (!this.#ended) return this.failed('the stream ended without finish_reason or [DONE]')
    return {
      ok: true,
      error: '',
      ttftMs: (this.#firstText || this.#firstChoice) - this.#start,
      itlsMs: this.#itls,
      latencyMs: this.#last - this.#start,
      promptTokens: this.#promptTokens,
      outputTokens: this.#outputTokens,
    }
  }

  failed(error: string): Outcome {
    const none = { ttftMs: 0, itlsMs: [], latencyMs: 0 }
    return { ok: false, error, ...none, promptTokens: undefined, outputTokens: undefined }
  }
}

interface StreamChoice {
  text?: string | null
  delta?: {
    content?: string | null
    reasoning?: string | null
    reasoning_content?: string | null
    tool_calls?: unknown[]
  }
  finish_reason?: string | null
}

interface StreamEvent {
  error?: unknown
  usage?: { prompt_tokens?: number; completion_tokens?: number } | null
  choices?: StreamChoice[]
}

/** A chat's first event often holds only the role, and its last only the reason it ended. */
function hasText({ text, delta }: StreamChoice): boolean {
  return Boolean(
    text || delta?.content || delta?.reasoning || delta?.reasoning_content || delta?.tool_calls,
  )
}

/** Calls `take` with the data of each event and the time its last byte came. */
function readEvents(
  response: IncomingMessage,
  take: (data: string, now: number) => void,
): Promise<void> {
  const decoder = new StringDecoder('utf8')
  let rest = ''
  return new Promise((resolve, reject) => {
    response.on('data', (chunk: Buffer) => {
      const now = performance.now()
      const lines = (rest + decoder.write(chunk)).split('\n')
      rest = lines.pop()!
      try {
        for (const line of lines) {
          // Servers of this API put an event's data on one line; comments keep a connection awake.
          if (line.startsWith('data:')) take(line.slice(5).trim(), now)
        }
      } catch (error) {
        response.destroy()
        reject(error)
      }
    })
    response.on('end', resolve)
    response.on('error', reject)
  })
}

async function readAll(response: IncomingMessage): Promise<string> {
  const chunks: Buffer[] = []
  for await (const chunk of response) chunks.push(chunk as Buffer)
  return Buffer.concat(chunks).toString()
}

function refusal(response: IncomingMessage, body: string): string {
  let text = body
  try {
    text = errorText((JSON.parse(body) as { error?: unknown }).error ?? body)
  } catch {
    // Not JSON: the body itself is the message.
  }
  return `HTTP ${response.statusCode}: ${text.slice(0, 300)}`
}

function errorText(error: unknown): string {
  if (typeof error === 'object' && error !== null && 'message' in error) {
    return String(error.message)
  }
  return typeof error === 'string' ? error : JSON.stringify(error)
}

function messageOf(error: unknown): string {
  if (error instanceof AggregateError) return error.errors.map(messageOf).join('; ')
  return error instanceof Error ? error.message : String(error)
}
