// Owns an HTTP request of a test's host: how it was answered, and what of it was sent.

import { once } from 'node:events'
import { type IncomingMessage, request } from 'node:http'
import { setTimeout as sleep } from 'node:timers/promises'

export interface HttpAsked {
  url: string
  body: string
  headers?: Record<string, string>
  /** Sends its body only when told to, as `Expect: 100-continue` says. */
  expects?: boolean
  /** Goes once so many bytes of the answer have come. */
  leaveAfter?: number
  /** Goes after so long, whatever has come; status 0 if nothing has. */
  leaveAfterMs?: number
}

export interface HttpAnswered {
  status: number
  headers: Record<string, unknown>
  text: string
  /** The server has asked for the body. */
  continued: boolean
}

export async function http(asked: HttpAsked): Promise<HttpAnswered> {
  const { url, body, headers = {}, expects = false, leaveAfter = Infinity, leaveAfterMs } = asked
  const bytes = Buffer.from(body)
  const outgoing = request(url, {
    method: 'POST',
    headers: {
      'content-type': 'application/json',
      'content-length': bytes.length,
      ...(expects ? { expect: '100-continue' } : {}),
      ...headers,
    },
  })
  // A server that refuses hangs up while the body is on its way.
  outgoing.on('error', () => {})
  let continued = false
  if (expects) {
    outgoing.flushHeaders()
    outgoing.on('continue', () => {
      continued = true
      outgoing.end(bytes)
    })
  } else outgoing.end(bytes)
  if (leaveAfterMs !== undefined) {
    await sleep(leaveAfterMs)
    outgoing.destroy()
    return { status: 0, headers: {}, text: '', continued }
  }
  const [response] = (await once(outgoing, 'response')) as [IncomingMessage]
  let text = ''
  for await (const chunk of response.setEncoding('utf8')) {
    text += String(chunk)
    if (text.length >= leaveAfter) break
  }
  outgoing.destroy()
  return { status: response.statusCode ?? 0, headers: response.headers, text, continued }
}
