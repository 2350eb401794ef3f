// Owns the file that says who may ask over datagrams: JSON with comments, a list of tenants with
// their keys and limits. A key is never part of a message.

import { readFileSync } from 'node:fs'
import { LatticeError } from '../errors.ts'
import type { EgressPolicy } from './egress.ts'
import type { TenantLimits } from './ingress.ts'
import { TENANTS_MAX } from './protocol.ts'

export interface DatagramTenant extends TenantLimits {
  /** Of the protocol's 1,024: what a client calls `tenant`. */
  index: number
  /** As the engine knows it: its prefixes are its own. */
  name: string
  /** How its answers are marked and paced; not at all unless given. */
  egress?: EgressPolicy
}

const FIELDS = [
  'tenant',
  'name',
  'keys',
  'tokens_per_second',
  'burst_tokens',
  'max_running',
  'priority',
  'bytes_per_second',
]

/** @throws LatticeError `usage` that says what is wrong where */
export function readTenants(path: string): DatagramTenant[] {
  let text: string
  try {
    text = readFileSync(path, 'utf8')
  } catch (cause) {
    throw new LatticeError('usage', `The tenants' file ${path} cannot be read.`, {
      todo: 'Name one with --net-tenants; docs/cli.md shows its format.',
      cause,
    })
  }
  return parseTenants(text, path)
}

/**
 * @param path for messages
 * @throws LatticeError `usage`
 * @example parseTenants('[{ "tenant": 1, "name": "a", "keys": ["00…"], … }]', 'tenants.jsonc')
 */
export function parseTenants(text: string, path: string): DatagramTenant[] {
  let list: unknown
  try {
    list = JSON.parse(withoutComments(text))
  } catch {
    // Not with the parser's words: they quote the text around the place, which may be a key.
    throw wrong(path, 'it is no JSON (comments and commas before a bracket may be in it)')
  }
  if (!Array.isArray(list)) throw wrong(path, 'it is no list of tenants')
  if (list.length === 0) throw wrong(path, 'it has no tenant')
  const tenants = list.map((item, i) => parseTenant(item, path, `tenant ${i + 1} of the list`))
  for (const field of ['index', 'name'] as const) {
    const seen = new Set<unknown>()
    for (const tenant of tenants) {
      const value = tenant[field]
      if (seen.has(value)) throw wrong(path, `two tenants have the ${field} ${value}`)
      seen.add(value)
    }
  }
  return tenants
}

function parseTenant(item: unknown, path: string, where: string): DatagramTenant {
  if (typeof item !== 'object' || item === null || Array.isArray(item)) {
    throw wrong(path, `${where} is no object`)
  }
  const fields = item as Record<string, unknown>
  const unknown = Object.keys(fields).find((name) => !FIELDS.includes(name))
  if (unknown !== undefined) throw wrong(path, `${where} has an unknown field "${unknown}"`)
  const count = (name: string, min: number, max: number): number => {
    const value = fields[name]
    if (Number.isInteger(value) && Number(value) >= min && Number(value) <= max) {
      return Number(value)
    }
    throw wrong(path, `"${name}" of ${where} is no whole number from ${min} to ${max}`)
  }
  const { name, keys } = fields
  if (typeof name !== 'string' || !/^[\w.-]{1,64}$/.test(name)) {
    throw wrong(path, `"name" of ${where} is not 1 to 64 letters, digits, ".", "_" or "-"`)
  }
  if (!Array.isArray(keys) || keys.length < 1 || keys.length > 2) {
    throw wrong(path, `"keys" of ${where} is no list of one or two keys`)
  }
  const read = keys.map((key, i) => {
    const bytes = parseKey(key)
    if (bytes) return bytes
    throw wrong(path, `key ${i} of ${where} is not 16 bytes in hex or base64`)
  })
  const [first, second = first] = read as [Uint8Array, Uint8Array?]
  const tenant: DatagramTenant = {
    index: count('tenant', 0, TENANTS_MAX - 1),
    name,
    keys: [first, second],
    tokensPerSecond: count('tokens_per_second', 10, 1e9),
    burstTokens: count('burst_tokens', 1, 1e9),
    maxRunning: count('max_running', 1, 2 ** 31),
  }
  const isMarked = 'priority' in fields
  const isPaced = 'bytes_per_second' in fields
  if (!isMarked && !isPaced) return tenant
  const priority = isMarked ? (count('priority', 0, 3) as 0 | 1 | 2 | 3) : undefined
  const bytesPerSecond = isPaced ? count('bytes_per_second', 1000, 1e11) : 0
  return { ...tenant, egress: { priority, bytesPerSecond } }
}

/** 16 bytes in hex or base64; undefined if it is neither. */
export function parseKey(text: unknown): Uint8Array | undefined {
  if (typeof text !== 'string') return undefined
  if (/^[0-9a-f]{32}$/i.test(text)) return Uint8Array.from(Buffer.from(text, 'hex'))
  if (/^[\w+/-]{22}(==)?$/.test(text)) return Uint8Array.from(Buffer.from(text, 'base64'))
  return undefined
}

/** JSON as it would be without comments, and without commas before a closing bracket. */
function withoutComments(text: string): string {
  const tokens = /"(?:[^"\\]|\\.)*"|\/\/[^\n]*|\/\*[^]*?\*\//g
  const bare = text.replace(tokens, (token) => (token.startsWith('"') ? token : ' '))
  return bare.replace(/("(?:[^"\\]|\\.)*")|,(?=\s*[\]}])/g, (_, string?: string) => string ?? '')
}

function wrong(path: string, what: string): LatticeError {
  return new LatticeError('usage', `The tenants' file ${path} is wrong: ${what}.`, {
    todo: 'docs/cli.md shows its format.',
  })
}
