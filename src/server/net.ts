// Owns GET, POST and DELETE /debug/net: what the datagram path does and decided, attaching it to an
// interface and detaching it, for `lattice net`.

import { z } from 'zod'
import { LatticeError } from '../errors.ts'
import { NET_REQUESTS_DEFAULT, NET_REQUESTS_MAX } from '../limits.ts'
import type { SynRate } from '../net/ingress.ts'
import { NET_MODES } from '../net/interface.ts'
import type { NetService } from '../net/net-service.ts'
import { PROTOCOL_PORT } from '../net/protocol.ts'
import { NET_RINGS } from '../net/ring-choice.ts'
import { readJson } from './body.ts'
import type { RouteContext, ServerContext } from './context.ts'
import { boolean, choice, integer, number, optional, parseParameters, string } from './validate.ts'

const rate = z.strictObject({
  per_second: number(0.01, 1e7),
  burst: integer(1, 1e6),
})

const attachment = z.strictObject({
  interface: string,
  queue: optional(integer(0, 65535)),
  mode: optional(choice(...NET_MODES)),
  port: optional(integer(1, 65535)),
  busy_poll: optional(integer(0, 65535)),
  ring: optional(choice(...NET_RINGS)),
  requests: optional(integer(1, NET_REQUESTS_MAX)),
  sample_every: optional(integer(0, 1 << 30)),
  force: optional(boolean),
  allow_generic: optional(boolean),
  syn: optional(rate),
  syn_total: optional(rate),
})

function limitOf(given: z.infer<typeof rate> | undefined): SynRate | undefined {
  return given && { perSecond: given.per_second, burst: given.burst }
}

/** `net` is null while the server is attached to nothing. */
export function netStatus({ net }: ServerContext) {
  return (c: RouteContext): Response => c.json({ net: net?.status() ?? null })
}

/** Decisions of the ingress program after number `after`. */
export function netEvents(context: ServerContext) {
  return (c: RouteContext): Response => {
    const after = Number(c.req.query('after') ?? 0)
    if (!Number.isSafeInteger(after) || after < 0) {
      throw new LatticeError('invalid_request', `'after' is ${c.req.query('after')}.`, {
        todo: 'Give the number of the last event that you have, or 0.',
        details: { param: 'after' },
      })
    }
    return c.json(withNet(context).events(after))
  }
}

export function netAttach(context: ServerContext) {
  return async (c: RouteContext): Promise<Response> => {
    const net = administrated(context, c)
    const how = parseParameters(attachment, await readJson(c))
    const [source, total] = [limitOf(how.syn), limitOf(how.syn_total)]
    // Where this request came in is where the connections come in that are to be limited.
    const port = c.env.incoming?.socket.localPort ?? 0
    const status = await net.attach({
      syn: source || total ? { port, source, total } : undefined,
      name: how.interface,
      queue: how.queue,
      mode: how.mode ?? 'native',
      port: how.port ?? PROTOCOL_PORT,
      busyPollBudget: how.busy_poll ?? 0,
      ring: how.ring,
      sampleEvery: how.sample_every ?? 0,
      requests: how.requests ?? NET_REQUESTS_DEFAULT,
      force: how.force ?? false,
      allowGeneric: how.allow_generic ?? false,
    })
    return c.json({ net: status }, 201)
  }
}

export function netDetach(context: ServerContext) {
  return async (c: RouteContext): Promise<Response> => {
    await administrated(context, c).detach()
    return c.json({ net: null })
  }
}

/**
 * Whoever may ask for an answer may not for that reason change the machine's network: only from
 * this machine is it allowed, with a key as ever.
 */
function administrated(context: ServerContext, c: RouteContext): NetService {
  const address = c.env.incoming?.socket.remoteAddress ?? ''
  if (!/^(127\.|::1$|::ffff:127\.)/.test(address)) {
    throw new LatticeError('unauthorized', 'Interfaces are attached from this machine only.', {
      todo: 'Run `lattice net` where the server runs.',
    })
  }
  return withNet(context)
}

function withNet({ net }: ServerContext): NetService {
  if (net) return net
  throw new LatticeError('net_refused', 'This server has no datagram path.', {
    todo: 'Start it with --net-tenants FILE.',
  })
}
