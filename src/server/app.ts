// Owns the routes and what happens around each: id, drain, key, counting, errors.

import { randomUUID } from 'node:crypto'
import { Hono, type Next } from 'hono'
import { cors } from 'hono/cors'
import { LatticeError } from '../errors.ts'
import { version } from '../version.ts'
import type { Authenticator } from './auth.ts'
import type { RouteContext, RouteEnv, ServerContext } from './context.ts'
import { errorResponse } from './errors.ts'
import { drainingError, livez, readyz } from './health.ts'
import { kv, metrics, sequences } from './metrics.ts'
import { netAttach, netDetach, netEvents, netStatus } from './net.ts'
import { chat } from './openai/chat.ts'
import { completions } from './openai/completions.ts'
import { model, models } from './openai/models.ts'
import { listPrefixes, pinPrefix, unpinPrefix } from './prefixes.ts'
import { listSessions, moveSession } from './sessions.ts'
import { detokenize, tokenize } from './tokenize.ts'

type Handler = (c: RouteContext) => Response | Promise<Response>
type Route = readonly [method: 'GET' | 'POST' | 'DELETE', path: string, handler: Handler]

const MODEL_PATH = '/v1/models/:id{.+}'
const PREFIX_PATH = '/v1/prefixes/:id'

/** @param origins of web pages that may ask from a browser; '*' is any */
export function createApp(
  context: ServerContext,
  auth: Authenticator,
  origins: readonly string[] = [],
): Hono<RouteEnv> {
  const routes: readonly Route[] = [
    ['GET', '/', (c) => c.json({ model: context.engine.model.id, endpoints: endpoints(routes) })],
    ['POST', '/v1/chat/completions', chat(context)],
    ['POST', '/v1/completions', completions(context)],
    ['GET', '/v1/models', models(context)],
    ['GET', MODEL_PATH, model(context)],
    ['POST', '/v1/prefixes', pinPrefix(context)],
    ['GET', '/v1/prefixes', listPrefixes(context)],
    ['DELETE', PREFIX_PATH, unpinPrefix(context)],
    ['GET', '/v1/sessions', listSessions(context)],
    ['POST', '/v1/sessions/:id/offload', moveSession(context, 'offload')],
    ['POST', '/v1/sessions/:id/reload', moveSession(context, 'reload')],
    ['POST', '/tokenize', tokenize(context)],
    ['POST', '/detokenize', detokenize(context)],
    ['GET', '/version', (c) => c.json({ version: version() })],
    ['GET', '/livez', livez],
    ['GET', '/readyz', readyz(context)],
    ['GET', '/health', readyz(context)],
    ['GET', '/metrics', metrics(context)],
    ['GET', '/debug/sequences', sequences(context)],
    ['GET', '/debug/kv', kv(context)],
    ['GET', '/debug/net', netStatus(context)],
    ['GET', '/debug/net/events', netEvents(context)],
    ['POST', '/debug/net', netAttach(context)],
    ['DELETE', '/debug/net', netDetach(context)],
  ]
  const app = new Hono<RouteEnv>()
  // First: a browser asks whether it may ask without any key.
  if (origins.length > 0) app.use(cors(corsOf(origins)))
  app.use(around(context, auth, new Set(routes.map(([, path]) => path))))
  for (const [method, path, handler] of routes) app.on(method, path, handler)
  app.notFound((c) => errorResponse(c, notFound(c, routes)))
  app.onError((error, c) => errorResponse(c, error))
  return app
}

function corsOf(origins: readonly string[]): Parameters<typeof cors>[0] {
  return {
    origin: origins.includes('*') ? '*' : [...origins],
    allowMethods: ['GET', 'POST', 'DELETE'],
    exposeHeaders: ['X-Request-Id', 'Retry-After'],
    maxAge: 3600,
  }
}

function around(context: ServerContext, auth: Authenticator, paths: ReadonlySet<string>) {
  return async (c: RouteContext, next: Next): Promise<void> => {
    const requestId = randomUUID().replaceAll('-', '')
    c.set('requestId', requestId)
    c.set('arrivalMs', performance.now())
    c.header('X-Request-Id', requestId)
    if (context.draining) c.header('Connection', 'close')
    context.metrics.httpInFlight.add(1)
    try {
      admit(context, auth, c)
      await next()
    } catch (error) {
      c.res = errorResponse(c, error)
    } finally {
      context.metrics.httpInFlight.add(-1)
      context.metrics.httpRequests.add(1, [routeLabel(c, paths), methodLabel(c), `${c.res.status}`])
    }
  }
}

/** @throws LatticeError `unauthorized`, or `draining` for what would start work */
function admit(context: ServerContext, auth: Authenticator, c: RouteContext): void {
  c.set('tenant', auth.tenant(c.req.path, c.req.header('authorization')))
  if (context.draining && c.req.method === 'POST') throw drainingError()
}

/** Labels are few whatever clients send: a path nobody serves is 'other'. */
function routeLabel(c: RouteContext, paths: ReadonlySet<string>): string {
  for (const path of ['/v1/models/', '/v1/prefixes/', '/v1/sessions/']) {
    if (c.req.path.startsWith(path)) return `${path}ID`
  }
  return paths.has(c.req.path) ? c.req.path : 'other'
}

function methodLabel(c: RouteContext): string {
  return ['GET', 'HEAD', 'POST', 'DELETE', 'OPTIONS'].includes(c.req.method)
    ? c.req.method
    : 'other'
}

function notFound(c: RouteContext, routes: readonly Route[]): LatticeError {
  const what = `There is no ${c.req.method.slice(0, 20)} ${c.req.path.slice(0, 100)}.`
  const other = routes.find(([, path]) => path === c.req.path)
  const todo = other ? `Use ${other[0]}.` : 'GET / lists the endpoints.'
  return new LatticeError('not_found', what, { todo })
}

function endpoints(routes: readonly Route[]): string[] {
  return routes.map(([method, path]) => `${method} ${path.replace(/:id[^/]*/, 'ID')}`)
}
