// Owns a small HTTP server for tests of downloads: ranges, dropped connections, tokens, counts.

import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'

export interface ServedFile {
  body: Buffer
  /** A server without ranges answers 200 with everything. */
  ranges?: boolean
  /** Bytes after which the connection is cut, for each of the first requests of the body. */
  cutAfter?: number[]
  /** Bytes after which nothing more comes, for each of the first requests of the body. */
  holdAfter?: number[]
  /** Statuses answered before anything else. */
  statuses?: number[]
  token?: string
  etag?: string
}

export interface FileServer {
  url: string
  files: Map<string, ServedFile>
  /** Every request as "PATH RANGE", in order. */
  requests: string[]
  /** The most bodies that were sent at once. */
  readonly mostAtOnce: number
  close(): Promise<void>
}

/** Starts a server on a free port of the loopback. */
export async function startFileServer(): Promise<FileServer> {
  const files = new Map<string, ServedFile>()
  const requests: string[] = []
  let atOnce = 0
  let mostAtOnce = 0
  const server = createServer((request, response) => {
    const path = decodeURIComponent((request.url ?? '').split('?')[0] ?? '')
    requests.push(`${path} ${request.headers.range ?? ''}`.trim())
    atOnce++
    mostAtOnce = Math.max(mostAtOnce, atOnce)
    response.on('close', () => atOnce--)
    answer(files.get(path), request, response)
  })
  await new Promise<void>((resolve) => {
    server.listen(0, '127.0.0.1', resolve)
  })
  const { port } = server.address() as AddressInfo
  return {
    url: `http://127.0.0.1:${port}`,
    files,
    requests,
    get mostAtOnce() {
      return mostAtOnce
    },
    close: async () => {
      server.closeAllConnections()
      await new Promise((resolve) => {
        server.close(resolve)
      })
    },
  }
}

function answer(file: ServedFile | undefined, request: IncomingMessage, response: ServerResponse) {
  const status = file?.statuses?.shift()
  if (file === undefined || status !== undefined) {
    return response.writeHead(status ?? 404, { 'retry-after': '0' }).end()
  }
  const { body, token, ranges = true, etag = '"v1"' } = file
  if (token !== undefined && request.headers.authorization !== `Bearer ${token}`) {
    return response.writeHead(401).end()
  }
  const range = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? '')
  const start = Number(range?.[1])
  const end = Math.min(Number(range?.[2]) + 1, body.byteLength)
  const valid = request.headers['if-range'] ?? etag
  if (!ranges || range === null || valid !== etag) {
    response.writeHead(200, { 'content-length': body.byteLength, etag })
    return send(file, body, response)
  }
  response.writeHead(206, {
    'content-range': `bytes ${start}-${end - 1}/${body.byteLength}`,
    'content-length': end - start,
    etag,
  })
  // The first byte alone is how a download asks for the size: it is never cut.
  if (end - start === 1) return response.end(body.subarray(start, end))
  send(file, body.subarray(start, end), response)
}

function send(file: ServedFile, body: Buffer, response: ServerResponse) {
  const hold = file.holdAfter?.shift()
  if (hold !== undefined) return response.write(body.subarray(0, hold))
  const cut = file.cutAfter?.shift()
  if (cut === undefined || cut >= body.byteLength) return response.end(body)
  response.write(body.subarray(0, cut), () => {
    // Time for the bytes to arrive before the connection goes.
    setTimeout(() => response.destroy(), 20)
  })
}
