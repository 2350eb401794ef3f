// Owns single HTTP requests of a download: ranges, errors worth repeating, stalls.

import http from 'node:http'
import { LatticeError } from '../../errors.ts'
import { DOWNLOAD_STALL_MS } from '../../limits.ts'

/** A failure that another attempt may mend; `waitMs` is the server's own wish. */
export class Transient extends Error {
  readonly waitMs: number | undefined

  constructor(message: string, waitMs?: number) {
    super(message)
    this.waitMs = waitMs
  }
}

export interface Request {
  url: string
  headers: Readonly<Record<string, string>>
  signal?: AbortSignal | undefined
}

let proxied = false

/** HTTPS_PROXY, HTTP_PROXY and NO_PROXY count, as they do for pip and npm. */
function useProxy(): void {
  if (proxied) return
  proxied = true
  http.setGlobalProxyFromEnv()
}

/**
 * Asks for a URL and hands over the response once it is good.
 * @throws Transient for dropped connections, 408, 429 and 5xx; LatticeError `download_failed` for
 *   answers that will not change
 */
export async function get(
  request: Request,
  range?: { start: number; end: number; ifRange: string | undefined },
): Promise<{ response: Response; watch: Watch }> {
  useProxy()
  const headers: Record<string, string> = { 'accept-encoding': 'identity', ...request.headers }
  if (range) {
    headers['range'] = `bytes=${range.start}-${range.end - 1}`
    if (range.ifRange !== undefined) headers['if-range'] = range.ifRange
  }
  const watch = new Watch(request.signal)
  try {
    const response = await fetch(request.url, { headers, signal: watch.signal })
    if (response.ok) return { response, watch }
    await response.body?.cancel()
    throw refused(request.url, response)
  } catch (thrown) {
    watch.stop()
    throw connectionError(thrown, request)
  }
}

/** Aborts a request when no byte has come for a while, or when the caller wants it. */
export class Watch {
  readonly signal: AbortSignal
  private readonly stalled = new AbortController()
  private readonly timer: NodeJS.Timeout

  constructor(outer: AbortSignal | undefined) {
    const signals = outer ? [outer, this.stalled.signal] : [this.stalled.signal]
    this.signal = AbortSignal.any(signals)
    const seconds = DOWNLOAD_STALL_MS / 1000
    const stall = () => this.stalled.abort(new Transient(`no byte came for ${seconds} s`))
    this.timer = setTimeout(stall, DOWNLOAD_STALL_MS)
  }

  alive(): void {
    this.timer.refresh()
  }

  stop(): void {
    clearTimeout(this.timer)
  }
}

/** The chunks of a response's body; a connection that drops is a Transient. */
export async function* chunks(
  { response, watch }: { response: Response; watch: Watch },
  request: Request,
): AsyncGenerator<Uint8Array> {
  try {
    for await (const chunk of response.body ?? []) {
      watch.alive()
      yield chunk
    }
  } catch (thrown) {
    throw connectionError(thrown, request)
  } finally {
    watch.stop()
  }
}

function connectionError(thrown: unknown, { signal, url }: Request): unknown {
  if (thrown instanceof LatticeError || thrown instanceof Transient) return thrown
  if (signal?.aborted) return signal.reason
  const cause = thrown instanceof Error ? thrown.cause : thrown
  const code = (cause as NodeJS.ErrnoException | undefined)?.code
  if (code === 'ENOTFOUND') {
    return new LatticeError('download_failed', `${new URL(url).host} is not known here.`, {
      todo: 'Check the network and the name; behind a proxy, set HTTPS_PROXY.',
    })
  }
  const reason = code ?? (cause instanceof Error ? cause.message : String(thrown))
  return new Transient(`${new URL(url).host}: ${reason}`)
}

function refused(url: string, response: Response): Error {
  const { status } = response
  const { host } = new URL(url)
  if (status === 408 || status === 429 || status >= 500) {
    const seconds = Number(response.headers.get('retry-after') ?? Number.NaN)
    const waitMs = Number.isFinite(seconds) ? Math.min(seconds, 60) * 1000 : undefined
    return new Transient(`${host} answered ${status}`, waitMs)
  }
  const todo =
    status === 401 || status === 403
      ? 'Set HF_TOKEN to a token that may read it, or accept its terms on the web page.'
      : 'Check the spelling of the source.'
  return new LatticeError('download_failed', `${host} answered ${status} for ${url}.`, {
    todo,
    details: { status, url },
  })
}

/** A JSON answer, asked for again while failures are transient. */
export async function getJson(request: Request, retry: Retry): Promise<unknown> {
  return retry(async () => {
    const { response, watch } = await get(request)
    try {
      return (await response.json()) as unknown
    } catch (thrown) {
      throw connectionError(thrown, request)
    } finally {
      watch.stop()
    }
  })
}

/** Runs something again while it fails transiently. */
export type Retry = <T>(attempt: () => Promise<T>) => Promise<T>

/**
 * @param attempts failures in a row that end it
 * @param baseMs wait after the first failure; doubles each time
 */
export function retrying(attempts: number, baseMs = 500): Retry {
  return async (attempt) => {
    for (let failures = 1; ; failures++) {
      try {
        return await attempt()
      } catch (thrown) {
        if (!(thrown instanceof Transient)) throw thrown
        if (failures >= attempts) throw gaveUp(thrown)
        await new Promise((resolve) => {
          setTimeout(resolve, thrown.waitMs ?? baseMs * 2 ** (failures - 1))
        })
      }
    }
  }
}

/** The error after the last attempt. */
export function gaveUp(last: Transient): LatticeError {
  return new LatticeError('download_failed', `The download failed: ${last.message}.`, {
    todo: 'Check the network and run the same command again: it goes on where it stopped.',
    cause: last,
  })
}
