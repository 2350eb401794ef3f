// Owns the probes: alive (the process answers) and ready (the engine answers and takes requests).

import { LatticeError } from '../errors.ts'
import { askSnapshot, type RouteContext, type ServerContext } from './context.ts'

export function livez(c: RouteContext): Response {
  return c.json({ status: 'alive' })
}

/** 200 when a request sent now would be taken, else 503 with the reason. */
export function readyz(context: ServerContext) {
  return async (c: RouteContext): Promise<Response> => {
    if (context.draining) throw drainingError()
    await askSnapshot(context.engine)
    return c.json({ status: 'ready', model: context.engine.model.id })
  }
}

export function drainingError(): LatticeError {
  return new LatticeError('draining', 'The server is shutting down and takes no new requests.', {
    todo: 'Try again at another replica, or here once it is back.',
  })
}
