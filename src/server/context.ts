// Owns what every route shares: the engine and its text, the metrics, and whether we are draining.

import type { HttpBindings } from '@hono/node-server'
import type { Context } from 'hono'
import type { ClientConnection, Engine, EngineSnapshot } from '../engine/api.ts'
import { LatticeError } from '../errors.ts'
import { connectionKey } from '../net/connection-key.ts'
import type { NetService } from '../net/net-service.ts'
import type { ServerMetrics } from '../observe/server-metrics.ts'
import type { ChatTemplate } from '../text/chat-template.ts'
import type { Tokenizer } from '../text/tokenizer.ts'

export interface ServerContext {
  readonly engine: Engine
  readonly tokenizer: Tokenizer
  /** Undefined if the model has none: then there is no chat endpoint to speak of. */
  readonly template: ChatTemplate | undefined
  readonly metrics: ServerMetrics
  /** Unix time in seconds at which the model was loaded. */
  readonly loadedAt: number
  /** Undefined if the server was started without one. */
  readonly net?: NetService | undefined
  /** The engine is told by the kernel which clients have gone. */
  readonly kernelDisconnect?: boolean | undefined
  draining: boolean
}

export interface RouteEnv {
  /** Absent when a test calls the app without a socket. */
  Bindings: Partial<HttpBindings>
  Variables: { requestId: string; tenant: string; arrivalMs: number }
}

export type RouteContext = Context<RouteEnv>

/** Who asked, if the engine is to know; undefined also for a request that came by no socket. */
export function connectionOf(
  { kernelDisconnect }: ServerContext,
  c: RouteContext,
): ClientConnection | undefined {
  if (!kernelDisconnect) return undefined
  const { remoteAddress, remotePort } = c.env.incoming?.socket ?? {}
  if (remoteAddress === undefined || remotePort === undefined) return undefined
  const ageNs = BigInt(Math.ceil((performance.now() - c.get('arrivalMs')) * 1e6))
  const sinceNs = process.hrtime.bigint() - ageNs
  return { key: connectionKey(remoteAddress, remotePort), sinceNs }
}

const SNAPSHOT_TIMEOUT_MS = 2000

/** Answers come between two steps; a step of a large model may take seconds. */
const ANSWER_TIMEOUT_MS = 30_000

/**
 * The engine's snapshot, or an error if it does not answer: health checks must not hang with it.
 * @throws LatticeError `engine_stopped`
 */
export function askSnapshot(engine: Engine): Promise<EngineSnapshot> {
  return askEngine(engine.snapshot(), SNAPSHOT_TIMEOUT_MS)
}

/**
 * What the engine answers, or an error if it does not in time.
 * @throws LatticeError `engine_stopped`
 */
export async function askEngine<T>(answer: Promise<T>, withinMs = ANSWER_TIMEOUT_MS): Promise<T> {
  const { promise: late, reject } = Promise.withResolvers<never>()
  const timer = setTimeout(() => reject(new Error('no answer in time')), withinMs)
  try {
    return await Promise.race([answer, late])
  } catch (cause) {
    throw new LatticeError('engine_stopped', 'The engine does not answer.', { cause })
  } finally {
    clearTimeout(timer)
  }
}
