// Owns how a run becomes an HTTP answer: one JSON document, or a stream of events as they come.

import type { GenerationEvent } from '../../engine/generation.ts'
import { toLatticeError } from '../../errors.ts'
import { warn } from '../../log.ts'
import type { AbortCause } from '../../observe/server-metrics.ts'
import type { RouteContext } from '../context.ts'
import { errorBody, logFailure } from '../errors.ts'
import { openSse, SSE_HEADERS, type SseStream } from '../sse.ts'
import type { Usage } from './run.ts'

/** Who waits for an answer and has gone: nginx's number, seen by metrics only. */
const CLIENT_CLOSED_REQUEST = 499

/** What is answered: generations here, or elsewhere. */
export interface Answering {
  readonly requestId: string
  readonly aborted: boolean
  /** Complete once `each` has resolved. */
  readonly usage: Usage
  each(take: (event: GenerationEvent) => void): Promise<void>
  /** False if it had ended already. */
  abort(cause: AbortCause): boolean
}

/** An endpoint's answer as one document. */
export interface Document {
  take(event: GenerationEvent): void
  json(usage: Usage): object
}

/** An endpoint's answer as event-stream frames; '' where there is nothing to send. */
export interface Frames {
  of(event: GenerationEvent): string
  /** The last frame before the end, if the client asked for usage. */
  usage(usage: Usage): string
}

export async function answerWhole(
  c: RouteContext,
  run: Answering,
  document: Document,
): Promise<Response> {
  await run.each((event) => document.take(event))
  if (run.aborted) return new Response(null, { status: CLIENT_CLOSED_REQUEST })
  return c.json(document.json(run.usage))
}

export function answerStream(c: RouteContext, run: Answering, frames: Frames): Response {
  const stream = openSse(() => run.abort('disconnect'))
  void pump(c, run, frames, stream)
  return c.body(stream.body, 200, SSE_HEADERS)
}

async function pump(
  c: RouteContext,
  run: Answering,
  frames: Frames,
  stream: SseStream,
): Promise<void> {
  try {
    await run.each((event) => {
      const text = frames.of(event)
      if (text !== '' && !stream.send(text)) dropSlowReader(c, run)
    })
    if (!run.aborted) stream.send(`${frames.usage(run.usage)}data: [DONE]\n\n`)
  } catch (thrown) {
    const error = toLatticeError(thrown)
    logFailure(error, run.requestId)
    stream.send(`data: ${JSON.stringify(errorBody(error, run.requestId))}\n\n`)
  }
  stream.end()
}

/** A reader that leaves too much unread costs memory without end: its connection is cut. */
function dropSlowReader(c: RouteContext, run: Answering): void {
  if (!run.abort('slow_reader')) return
  warn(`${run.requestId}: the client does not read its stream; the connection is cut.`)
  c.env.outgoing?.destroy()
}
