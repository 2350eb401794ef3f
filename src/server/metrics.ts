// Owns GET /metrics, /debug/sequences and /debug/kv: what the engine does and holds, for scrapers,
// `lattice ps` and `lattice top`.

import { toLatticeError } from '../errors.ts'
import { askEngine, askSnapshot, type RouteContext, type ServerContext } from './context.ts'
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

/** The map of KV memory; asked for only here, so that scraping stays cheap. */
export function kv(context: ServerContext) {
  return async (c: RouteContext): Promise<Response> => {
    const { snapshot, map } = await askEngine(context.engine.ask({ kind: 'map' }))
    return c.json({ model: context.engine.model.id, engine: snapshot, kv: map })
  }
}
