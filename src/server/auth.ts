// Owns who may ask and who pays: API keys, compared in constant time, and the tenant of each.

import { createHash, timingSafeEqual } from 'node:crypto'
import { LatticeError } from '../errors.ts'

/** Routes that answer without a key: probes and scrapers have none, and they reveal no text. */
const OPEN_PATHS: ReadonlySet<string> = new Set([
  ...['/', '/version', '/livez', '/readyz', '/health', '/metrics'],
])

/** Hex digits of a key's SHA-256 that name its tenant: unique in practice, useless to a thief. */
const TENANT_DIGITS = 12

export interface Authenticator {
  /**
   * The tenant that pays for a request.
   * @throws LatticeError `unauthorized`
   */
  tenant(path: string, authorization: string | undefined): string
}

/** @param keys none lets everyone in as 'default'. */
export function authenticator(keys: readonly string[]): Authenticator {
  if (!keys.every((key) => /^\S+$/.test(key))) {
    throw new LatticeError('usage', 'An API key is empty or has white space in it.', {
      todo: 'Use a key that fits in Authorization: Bearer KEY.',
    })
  }
  const digests = keys.map(sha256)
  return {
    tenant(path, authorization) {
      if (digests.length === 0 || OPEN_PATHS.has(path)) return 'default'
      const given = sha256(bearerToken(authorization))
      // Every digest is compared, so the time says nothing about which one came close.
      let match: Buffer | undefined
      for (const digest of digests) if (timingSafeEqual(digest, given)) match = digest
      if (match) return `key-${match.toString('hex').slice(0, TENANT_DIGITS)}`
      throw new LatticeError('unauthorized', 'The API key is not one of this server’s.', {
        todo: 'Send Authorization: Bearer KEY with a key the server was started with.',
      })
    },
  }
}

function bearerToken(authorization: string | undefined): string {
  const match = /^Bearer +(\S+) *$/i.exec(authorization ?? '')
  if (match) return match[1]!
  throw new LatticeError('unauthorized', 'This server asks for an API key.', {
    todo: 'Send it as Authorization: Bearer KEY.',
  })
}

function sha256(text: string): Buffer {
  return createHash('sha256').update(text).digest()
}
