// Owns how an error looks to an HTTP client: OpenAI's JSON, our stable code, what to do about it.

import type { ContentfulStatusCode } from 'hono/utils/http-status'
import { type LatticeError, toLatticeError } from '../errors.ts'
import { warn } from '../log.ts'
import type { RouteContext } from './context.ts'

/** Seconds after which a refused client may try again, by error code. */
const RETRY_AFTER_SECONDS: Readonly<Record<string, number>> = {
  queue_full: 1,
  draining: 5,
  engine_stopped: 5,
}

export interface ErrorBody {
  error: { message: string; type: string; param: string | null; code: string }
}

/** The body for `error`; a failure of ours is described by its request id only. */
export function errorBody(error: LatticeError, requestId: string): ErrorBody {
  const ours = error.code === 'internal'
  const message = ours
    ? `The server failed; its log says more under ${requestId}.`
    : [error.message, error.todo].filter(Boolean).join(' ')
  const param = error.details['param']
  return {
    error: {
      message,
      type: errorType(error.status),
      param: typeof param === 'string' ? param : null,
      code: error.code,
    },
  }
}

/** Anything thrown by a route, as a response. Failures of ours are logged. */
export function errorResponse(c: RouteContext, thrown: unknown): Response {
  const error = toLatticeError(thrown)
  const requestId = c.get('requestId') ?? 'no id'
  logFailure(error, requestId)
  const retryAfter = RETRY_AFTER_SECONDS[error.code]
  if (retryAfter !== undefined) c.header('Retry-After', String(retryAfter))
  if (error.code === 'unauthorized') c.header('WWW-Authenticate', 'Bearer')
  return c.json(errorBody(error, requestId), error.status as ContentfulStatusCode)
}

/** Says what went wrong on our side, once; a client's mistakes are the client's to see. */
export function logFailure(error: LatticeError, requestId: string): void {
  if (error.status < 500 || error.code === 'draining') return
  const cause = error.cause instanceof Error ? (error.cause.stack ?? '') : ''
  warn(`${requestId}: ${error.code}: ${error.message}${cause ? `\n${cause}` : ''}`)
}

function errorType(status: number): string {
  if (status === 401) return 'authentication_error'
  if (status === 429) return 'rate_limit_error'
  return status < 500 ? 'invalid_request_error' : 'server_error'
}
