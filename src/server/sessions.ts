// Owns /v1/sessions: what is cached of a tenant's conversations, in memory or outside of it, and
// moving one from there to here.

import type { SessionMove, SessionSnapshot } from '../engine/api.ts'
import { LatticeError } from '../errors.ts'
import { askEngine, type RouteContext, type ServerContext } from './context.ts'

export function listSessions({ engine }: ServerContext) {
  return async (c: RouteContext): Promise<Response> => {
    const question = { kind: 'sessions', tenant: c.get('tenant') } as const
    const sessions = await askEngine(engine.ask(question))
    return c.json({ object: 'list', data: sessions.map(sessionJson) })
  }
}

/** Answers when the move has begun: 200 if there was nothing to move, else 202. */
export function moveSession({ engine }: ServerContext, kind: 'offload' | 'reload') {
  return async (c: RouteContext): Promise<Response> => {
    const id = c.req.param('id') ?? ''
    const move = await askEngine(engine.ask({ kind, tenant: c.get('tenant'), id }))
    if (move !== 'done' && move !== 'moving') throw refused(move, id.slice(0, 40))
    return c.json({ id, object: 'session', state: move }, move === 'done' ? 200 : 202)
  }
}

function sessionJson(session: SessionSnapshot): object {
  const { id, tokens, pages, outPages, bytes, where, durable, idleMs } = session
  const places = { where, pages, offloaded_pages: outPages, bytes }
  return { id, object: 'session', tokens, ...places, durable, idle_ms: Math.round(idleMs) }
}

function refused(move: Exclude<SessionMove, 'done' | 'moving'>, id: string): LatticeError {
  if (move === 'unknown') {
    return new LatticeError('not_found', `There is no session ${id}.`, {
      todo: 'GET /v1/sessions or `lattice ps --sessions` lists yours; each turn has a new id.',
    })
  }
  if (move === 'impossible') {
    return new LatticeError('invalid_request', 'There is nowhere to move a session to.', {
      todo: 'Start the server with --kv-offload SIZE, or on a GPU with --kv-host SIZE.',
    })
  }
  return new LatticeError('session_busy', `Session ${id} cannot be moved now.`, {
    todo: 'A request uses it, or there is no room: try again later.',
  })
}
