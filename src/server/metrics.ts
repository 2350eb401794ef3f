// Owns GET /metrics and GET /debug/sequences: what the engine does, for scrapers and `lattice ps`.

import { toLatticeError } from '../errors.ts'
import { askSnapshot, type RouteContext, type ServerContext } from './context.ts'
import { logFailure } from './errors.ts'

/** The exposition; while the engine does not answer, `lattice_engine_up` is 0 and says so. */
export function metrics(context: ServerContext) {
  return async (c: RouteContext): Promise<Response> => {
    const snapshot = await askSnapshot(context.engine).catch((error: unknown) => {
      logFailure(toLatticeError(error), c.get('requestId'))
      return undefined
    })
    const type = 'text/plain; version=0.0.4; charset=utf-8'
    return c.body(context.metrics.text(snapshot), 200, { 'Content-Type': type })
  }
}

export function sequences(context: ServerContext) {
  return async (c: RouteContext): Promise<Response> => c.json(await askSnapshot(context.engine))
}
