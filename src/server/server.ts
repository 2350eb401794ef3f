// Owns the listening server: the socket below the routes, draining, closing.

import { createServer, type Server as HttpServer, STATUS_CODES } from 'node:http'
import type { AddressInfo, ListenOptions, Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { getRequestListener } from '@hono/node-server'
import type { Engine } from '../engine/api.ts'
import { LatticeError, toLatticeError } from '../errors.ts'
import { Steering } from '../net/steer.ts'
import type { NetService } from '../net/net-service.ts'
import { ServerMetrics } from '../observe/server-metrics.ts'
import type { ChatTemplate } from '../text/chat-template.ts'
import type { Tokenizer } from '../text/tokenizer.ts'
import { createApp } from './app.ts'
import { authenticator } from './auth.ts'
import type { ServerContext } from './context.ts'
import { errorBody } from './errors.ts'

export interface ServerOptions {
  engine: Engine
  tokenizer: Tokenizer
  /** Undefined if the model has none: chat is then refused. */
  template: ChatTemplate | undefined
  host: string
  /** 0 takes any free port; `Server.url` says which. */
  port: number
  /** None lets everyone in. */
  apiKeys?: readonly string[]
  /** Of web pages that may ask from a browser; '*' is any. */
  allowOrigins?: readonly string[]
  /** Other servers may listen on the port too: a connection goes to who has the least to do. */
  sharePort?: boolean
  /** The datagram path, which `lattice net` controls through this server; the caller's to close. */
  net?: NetService | undefined
  /** The engine was told where the kernel says which clients have gone. */
  kernelDisconnect?: boolean
}

export interface Server {
  /** Where it listens, such as http://127.0.0.1:8080. */
  readonly url: string
  /**
   * Refuses new requests, waits for the running ones, then stops listening. The engine drains
   * too. Resolves when the last connection has ended; probes are answered until then.
   */
  drain(): Promise<void>
  /** Cuts every connection at once, which aborts what runs. The engine stays the caller's. */
  close(): Promise<void>
}

/** After the last token a client gets this long to take the rest of its answer. */
const FLUSH_MS = 5000
const IDLE_CHECK_MS = 20

/** @throws LatticeError `usage` if the address cannot be listened on */
export async function startServer(options: ServerOptions): Promise<Server> {
  const context: ServerContext = {
    engine: options.engine,
    tokenizer: options.tokenizer,
    template: options.template,
    metrics: new ServerMetrics(),
    loadedAt: Math.floor(Date.now() / 1000),
    net: options.net,
    kernelDisconnect: options.kernelDisconnect,
    draining: false,
  }
  const app = createApp(context, authenticator(options.apiKeys ?? []), options.allowOrigins)
  const listener = getRequestListener(app.fetch, {
    hostname: options.host,
    errorHandler: unreadableRequest,
  })
  // Clients of HTTP/1.0 send no Host, and nothing here depends on it.
  const http = createServer({ requireHostHeader: false }, listener)
  http.on('clientError', refuseGarbage)
  const { sharePort = false } = options
  await listen(http, { host: options.host, port: options.port, reusePort: sharePort })
  const leave = sharePort ? steer(http) : () => {}
  const closed = new Promise<void>((resolve) => http.once('close', resolve))
  return {
    url: urlOf(http.address() as AddressInfo),
    async drain() {
      context.draining = true
      leave()
      http.closeIdleConnections()
      await options.engine.drain()
      await closeGently(http, closed)
    },
    async close() {
      context.draining = true
      leave()
      http.close()
      http.closeAllConnections()
      await closed
    },
  }
}

/** Takes part in the choice of who gets a connection; returns what leaves it. */
function steer(http: HttpServer): () => void {
  const { fd } = (http as unknown as { _handle: { fd: number } })._handle
  let steering: Steering
  try {
    steering = Steering.join(fd, (http.address() as AddressInfo).port)
  } catch (thrown) {
    http.close()
    throw thrown
  }
  let running = 0
  http.on('request', (_request, response) => {
    steering.setLoad(++running)
    response.once('close', () => steering.setLoad(--running))
  })
  return () => steering.leave()
}

async function listen(http: HttpServer, at: ListenOptions): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<void>()
  http.once('error', reject)
  http.listen(at, resolve)
  try {
    await promise
  } catch (error) {
    const why = error instanceof Error ? error.message : String(error)
    throw new LatticeError('usage', `Cannot listen on ${at.host}:${at.port}: ${why}.`, {
      todo: 'Choose another address with --host and --port.',
      cause: error,
    })
  } finally {
    http.off('error', reject)
  }
}

/** Stops listening; a connection closes once its answer is taken, or after FLUSH_MS. */
async function closeGently(http: HttpServer, closed: Promise<void>): Promise<void> {
  http.close()
  const deadline = performance.now() + FLUSH_MS
  let done = false
  void closed.then(() => (done = true))
  while (!done && performance.now() < deadline) {
    http.closeIdleConnections()
    await Promise.race([closed, sleep(IDLE_CHECK_MS)])
  }
  http.closeAllConnections()
  await closed
}

/** A request that is HTTP but no usable one, such as a Host or target that makes no URL. */
function unreadableRequest(thrown: unknown): Response {
  const why = thrown instanceof Error ? thrown.message : String(thrown)
  const error = new LatticeError('invalid_request', `The request cannot be read: ${why}.`)
  return Response.json(errorBody(error, ''), { status: 400 })
}

/** What is not HTTP never reaches the routes: it is answered on the socket, which then ends. */
function refuseGarbage(error: NodeJS.ErrnoException, socket: Socket): void {
  if (error.code === 'ECONNRESET' || !socket.writable) {
    socket.destroy()
    return
  }
  const status =
    error.code === 'HPE_HEADER_OVERFLOW'
      ? 431
      : error.code === 'ERR_HTTP_REQUEST_TIMEOUT'
        ? 408
        : 400
  const what = `The request is not valid HTTP: ${toLatticeError(error).message}.`
  const body = JSON.stringify(errorBody(new LatticeError('invalid_request', what), ''))
  socket.end(
    `HTTP/1.1 ${status} ${STATUS_CODES[status]}\r\nContent-Type: application/json\r\n` +
      `Content-Length: ${Buffer.byteLength(body)}\r\nConnection: close\r\n\r\n${body}`,
  )
}

function urlOf(address: AddressInfo): string {
  const host = address.family === 'IPv6' ? `[${address.address}]` : address.address
  return `http://${host}:${address.port}`
}
