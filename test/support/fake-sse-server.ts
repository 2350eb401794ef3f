// Owns a server of the OpenAI API that has no model: it streams at set times and notes when it did.

import { once } from 'node:events'
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'

export interface Script {
  ttftMs: number
  gapMs: number
  tokens: number
  /** How it goes wrong: refused, cut in mid-stream, an error event, or silent for ever. */
  failure?: 'status' | 'cut' | 'event' | 'silence'
  /** Leaves usage out. */
  uncounted?: boolean
  /** Sends a role first and the reason of the end apart, as chats do. */
  chat?: boolean
}

/** performance.now() as the server saw it; the client runs on the same clock. */
export interface Served {
  body: Record<string, unknown>
  path: string
  arrived: number
  written: number[]
}

export class FakeSseServer {
  readonly served: Served[] = []
  running = 0
  runningMax = 0
  /** Whether /tokenize answers; words are its tokens, and "education" is two. */
  tokenizes = true
  readonly #server: Server
  readonly #script: (index: number) => Script

  constructor(script: (index: number) => Script) {
    this.#script = script
    this.#server = createServer((request, response) => void this.#answer(request, response))
  }

  async listen(): Promise<string> {
    this.#server.listen(0, '127.0.0.1')
    await once(this.#server, 'listening')
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`
  }

  close(): void {
    this.#server.close()
    this.#server.closeAllConnections()
  }

  async #answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const arrived = performance.now()
    const chunks: Buffer[] = []
    for await (const chunk of request) chunks.push(chunk as Buffer)
    const body = JSON.parse(Buffer.concat(chunks).toString() || '{}') as Record<string, unknown>
    const path = request.url!
    if (path === '/v1/models') return json(response, { data: [{ id: 'fake-model' }] })
    if (path === '/tokenize' && this.tokenizes) {
      return json(response, { tokens: tokenize(body['prompt'] as string) })
    }
    if (path === '/detokenize' && this.tokenizes) {
      return json(response, { prompt: (body['tokens'] as number[]).map(wordOf).join(' ') })
    }
    if (!path.endsWith('/completions')) {
      response.statusCode = 404
      return json(response, { error: { message: 'no such path' } })
    }
    const served: Served = { body, path, arrived, written: [] }
    const script = this.#script(this.served.push(served) - 1)
    this.runningMax = Math.max(this.runningMax, ++this.running)
    await this.#stream(served, script, response)
    this.running -= 1
  }

  async #stream(served: Served, script: Script, response: ServerResponse): Promise<void> {
    if (script.failure === 'status') {
      response.statusCode = 429
      return json(response, { error: { message: 'busy', type: 'rate' } })
    }
    const choice = (text: string, reason: string | null = null): object =>
      script.chat
        ? { index: 0, delta: text === '' ? {} : { content: text }, finish_reason: reason }
        : { index: 0, text, finish_reason: reason }
    const write = (event: object): void => {
      response.write(`data: ${JSON.stringify(event)}\n\n`)
    }
    response.setHeader('content-type', 'text/event-stream')
    if (script.chat) {
      write({ choices: [{ index: 0, delta: { role: 'assistant', content: '' } }] })
    }
    for (let token = 0; token < script.tokens; token++) {
      await sleep(token === 0 ? script.ttftMs : script.gapMs)
      if (token > 0 && script.failure === 'cut') return void response.destroy()
      if (token > 0 && script.failure === 'silence') return
      if (token > 0 && script.failure === 'event') {
        write({ error: { message: 'out of luck' } })
        return void response.end()
      }
      served.written.push(performance.now())
      write({ choices: [choice(`é${token} `)] })
      if (token === 0) response.write(': a comment\n\n')
    }
    write({ choices: [choice('', 'length')] })
    if (!script.uncounted) {
      write({ choices: [], usage: { prompt_tokens: 7, completion_tokens: script.tokens } })
    }
    response.end('data: [DONE]\n\n')
  }
}

function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms))
}

function json(response: ServerResponse, value: object): void {
  response.setHeader('content-type', 'application/json')
  response.end(JSON.stringify(value))
}

const words: string[] = []

function wordOf(id: number): string {
  return words[id]!
}

function tokenize(text: string): number[] {
  const parts = text.split(' ').flatMap((w) => (w === 'education' ? ['educ', 'ation'] : [w]))
  return parts.map((word) => {
    const known = words.indexOf(word)
    return known >= 0 ? known : words.push(word) - 1
  })
}
