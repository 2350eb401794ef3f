// Owns one server-sent event stream: frames go in at once, what a client has not taken is bounded.

import { MAX_STREAM_BUFFER_BYTES } from '../limits.ts'

export const SSE_HEADERS = {
  'Content-Type': 'text/event-stream; charset=utf-8',
  'Cache-Control': 'no-cache',
  // Proxies that buffer would hold tokens back.
  'X-Accel-Buffering': 'no',
} as const

export interface SseStream {
  readonly body: ReadableStream<Uint8Array>
  /** False if the client is gone or has left too much unread: then nothing was sent. */
  send(frames: string): boolean
  end(): void
}

/**
 * Frames are built by the caller (`data: …\n\n`), so that one token costs one enqueue and no
 * promise. @param onCancel called once if the client goes away before `end`.
 */
export function openSse(onCancel: () => void): SseStream {
  let controller: ReadableStreamDefaultController<Uint8Array> | undefined
  const body = new ReadableStream<Uint8Array>(
    {
      start: (c) => void (controller = c),
      cancel() {
        controller = undefined
        onCancel()
      },
    },
    new ByteLengthQueuingStrategy({ highWaterMark: MAX_STREAM_BUFFER_BYTES }),
  )
  return {
    body,
    send(frames) {
      if (!controller || (controller.desiredSize ?? 0) <= 0) return false
      controller.enqueue(Buffer.from(frames))
      return true
    },
    end() {
      controller?.close()
      controller = undefined
    },
  }
}
