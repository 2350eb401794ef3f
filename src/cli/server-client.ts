// Owns how a command talks to a running server: its address, its key, and what each refusal means.

import type { Command } from 'commander'
import { ERROR_CODES, type ErrorCode, LatticeError } from '../errors.ts'
import { parseUrl } from './parse.ts'

export interface ServerAddress {
  url: string
  apiKey?: string
}

const ANSWER_TIMEOUT_MS = 10_000

export function addServerOptions(command: Command): Command {
  return command
    .option('--url <URL>', 'address of the server', parseUrl, 'http://127.0.0.1:8080')
    .option('--api-key <KEY>', 'key of the server (default: LATTICE_API_KEY)')
}

/** Asks for JSON; with a body, posts it unless another method is named. */
export interface ServerCall {
  method?: 'GET' | 'POST' | 'DELETE'
  body?: object
  timeoutMs?: number
}

/**
 * The object that a server answers.
 * @throws LatticeError `server_unreachable` also if what answers is no Lattice server,
 *   `unauthorized`, `engine_stopped`, or what the server itself says
 */
export async function askServer(
  { url, apiKey }: ServerAddress,
  path: string,
  { method, body, timeoutMs = ANSWER_TIMEOUT_MS }: ServerCall = {},
): Promise<Record<string, unknown>> {
  const key = apiKey ?? process.env['LATTICE_API_KEY']
  let response: Response
  try {
    response = await fetch(`${url}${path}`, {
      method: method ?? (body ? 'POST' : 'GET'),
      headers: {
        ...(key === undefined ? {} : { authorization: `Bearer ${key}` }),
        ...(body === undefined ? {} : { 'content-type': 'application/json' }),
      },
      ...(body === undefined ? {} : { body: JSON.stringify(body) }),
      signal: AbortSignal.timeout(timeoutMs),
    })
  } catch (cause) {
    throw new LatticeError('server_unreachable', `No server answers at ${url}.`, {
      todo: 'Start one with `lattice serve`, or name another with --url.',
      cause,
    })
  }
  const answer: unknown = await response.json().catch(() => undefined)
  if (response.ok && typeof answer === 'object' && answer !== null) {
    return answer as Record<string, unknown>
  }
  throw refusal(url, response.status, answer)
}

/** Why a list of what a server has cached is empty. */
export async function whyNothing(options: ServerAddress, otherwise: string): Promise<string> {
  const { kv } = (await askServer(options, '/debug/sequences')) as {
    kv?: { prefixLimitPages?: unknown }
  }
  if (kv?.prefixLimitPages !== 0) return otherwise
  return 'The server has no prefix cache: start it with --prefix-cache SIZE.'
}

export function notLattice(url: string, status: number): LatticeError {
  const what = `What answers at ${url} is no Lattice server (status ${status}).`
  return new LatticeError('server_unreachable', what, {
    todo: 'Name the address of one with --url.',
  })
}

function refusal(url: string, status: number, answer: unknown): LatticeError {
  if (status === 401) {
    return new LatticeError('unauthorized', `The server at ${url} asks for another API key.`, {
      todo: 'Give it with --api-key or in LATTICE_API_KEY.',
    })
  }
  if (status === 503) {
    return new LatticeError(
      'engine_stopped',
      `The server at ${url} has an engine that is silent.`,
      {
        todo: 'It computes a very long step or has stopped: try again, then look at its log.',
      },
    )
  }
  const { error } = (answer ?? {}) as { error?: { code?: unknown; message?: unknown } }
  if (typeof error?.code === 'string' && error.code in ERROR_CODES) {
    return new LatticeError(error.code as ErrorCode, String(error.message))
  }
  return notLattice(url, status)
}
