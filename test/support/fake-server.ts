// Owns a served fake engine for tests, with a template simple enough to write by hand.

import type { ChatTemplate } from '../../src/text/chat-template.ts'
import { createApp } from '../../src/server/app.ts'
import { authenticator } from '../../src/server/auth.ts'
import type { ServerContext } from '../../src/server/context.ts'
import { type Server, type ServerOptions, startServer } from '../../src/server/server.ts'
import { ServerMetrics } from '../../src/observe/server-metrics.ts'
import { FakeEngine, type FakeEngineOptions } from './fake-engine.ts'
import { fakeTokenizer } from './fake-tokenizer.ts'

/** `role: content` lines, calls and tools as JSON, then the start of the assistant's turn. */
export const fakeTemplate: ChatTemplate = {
  takesTools: true,
  render(messages, options) {
    const tools = options?.tools ? `tools: ${JSON.stringify(options.tools)}\n` : ''
    const lines = messages.map((message) => {
      const calls = message.tool_calls ? ` ${JSON.stringify(message.tool_calls)}` : ''
      return `${message.role}: ${String(message.content)}${calls}<|end|>\n`
    })
    return `<|bos|>${tools}${lines.join('')}${options?.addGenerationPrompt ? 'assistant: ' : ''}`
  },
}

export interface FakeServer extends AsyncDisposable {
  engine: FakeEngine
  server: Server
  url: string
}

export async function fakeServer(
  engineOptions: FakeEngineOptions = {},
  serverOptions: Partial<ServerOptions> = {},
): Promise<FakeServer> {
  const engine = new FakeEngine(engineOptions)
  const server = await startServer({
    engine,
    tokenizer: fakeTokenizer(),
    template: fakeTemplate,
    host: '127.0.0.1',
    port: 0,
    ...serverOptions,
  })
  return {
    engine,
    server,
    url: server.url,
    async [Symbol.asyncDispose]() {
      await server.close()
      await engine.close()
    },
  }
}

/** The routes without a socket, for tests of many requests. */
export function fakeApp(engineOptions: FakeEngineOptions = {}) {
  const engine = new FakeEngine(engineOptions)
  const context: ServerContext = {
    engine,
    tokenizer: fakeTokenizer(),
    template: fakeTemplate,
    metrics: new ServerMetrics(),
    loadedAt: 1_700_000_000,
    draining: false,
  }
  return { engine, context, app: createApp(context, authenticator([])) }
}
