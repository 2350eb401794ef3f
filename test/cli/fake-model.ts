// Owns the stand-in that the command tests run on: a model that says "w0 w1 w2 …", a word every
// few milliseconds. Preloaded with --import, it takes the place of the modules that load a model.

import { createServer } from 'node:http'
import { registerHooks } from 'node:module'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Generation, GenerationRequest } from '../../src/engine/generation.ts'
import { LatticeError } from '../../src/errors.ts'

const REPLACED = [
  '/model/registry.ts',
  '/model/load.ts',
  '/text/load.ts',
  '/engine/start.ts',
  '/engine/generation.ts',
  '/server/server.ts',
]
const SELF = import.meta.url
const CONTEXT = 100
const WORD_MS = Number(process.env['FAKE_WORD_MS'] ?? 5)

registerHooks({
  resolve(specifier, context, next) {
    if (context.parentURL?.includes('/src/cli/')) {
      if (REPLACED.some((path) => specifier.endsWith(path))) {
        return { url: SELF, shortCircuit: true }
      }
    }
    return next(specifier, context)
  },
})

export const resolveModel = async (source: string | undefined) => {
  if (source === 'nowhere') {
    throw new LatticeError('model_not_found', 'There is no model nowhere.', { todo: 'Pull one.' })
  }
  return { id: source ?? 'fake', path: '/fake' }
}

export const openModel = () => ({})

/** One token a character. */
export const loadTokenizer = () => ({
  encode: (text: string) => Int32Array.from(text, (character) => character.codePointAt(0) ?? 0),
})

export const loadChatTemplate = () =>
  process.env['FAKE_TEMPLATE'] === 'none'
    ? undefined
    : {
        render: (messages: readonly { role: string; content: string }[]) =>
          messages.map(({ role, content }) => `${role}:${content};`).join(''),
      }

/** With FAKE_ECHO, its report is what it was asked for. */
export const startEngine = async (_path: string, options: object) => ({
  engine: { model: { contextLength: CONTEXT }, close: async () => {}, drain: async () => {} },
  report: [process.env['FAKE_ECHO'] ? JSON.stringify(options) : 'fake engine, 1 thread'],
})

/** Says how it was asked, so that a test sees what reached it; then counts words. */
export function generate(_engine: unknown, _text: unknown, request: GenerationRequest): Generation {
  const prompt = String.fromCodePoint(...request.prompt)
  if (prompt.length + request.maxTokens > CONTEXT) {
    throw new LatticeError('context_length_exceeded', `${prompt.length} tokens are too many.`)
  }
  const abort = new AbortController()
  async function* events(): Generation['events'] extends AsyncIterable<infer E>
    ? AsyncGenerator<E>
    : never {
    yield { kind: 'delta', choice: 0, text: `[${prompt}]`, tokens: [] }
    let words = 0
    for (; words < request.maxTokens && !abort.signal.aborted; words++) {
      yield { kind: 'delta', choice: 0, text: ` w${words}`, tokens: [] }
      await sleep(WORD_MS)
    }
    const reason = abort.signal.aborted ? 'abort' : 'length'
    const end = { choice: 0, matched: undefined, outputTokens: words, error: undefined }
    yield { kind: 'finish', reason, ...end }
  }
  return { events: events(), discardedTokens: 0, abort: () => abort.abort() }
}

/** Answers everything with {}; a drain takes as long as FAKE_DRAIN_MS says. */
export const startServer = async ({ host, port }: { host: string; port: number }) => {
  const server = createServer((_request, response) => response.end('{}'))
  await new Promise<void>((resolve) => server.listen(port, host, resolve))
  const address = server.address()
  const bound = typeof address === 'object' && address !== null ? address.port : port
  return {
    url: `http://${host}:${bound}`,
    drain: () => sleep(Number(process.env['FAKE_DRAIN_MS'] ?? 0)),
    close: async () => void server.close(),
  }
}
