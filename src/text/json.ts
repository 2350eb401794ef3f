// Owns reading a tokenizer.json's fields: each reader names the field it could not read.

import { LatticeError } from '../errors.ts'

export type Json = unknown

export function object(json: Json, at: string): Readonly<Record<string, Json>> {
  if (typeof json === 'object' && json !== null && !Array.isArray(json)) {
    return json as Record<string, Json>
  }
  throw wrong(at, 'an object', json)
}

export function list(json: Json, at: string): readonly Json[] {
  if (Array.isArray(json)) return json
  throw wrong(at, 'an array', json)
}

export function text(json: Json, at: string): string {
  if (typeof json === 'string') return json
  throw wrong(at, 'a string', json)
}

export function number(json: Json, at: string): number {
  if (typeof json === 'number') return json
  throw wrong(at, 'a number', json)
}

/** A token id: a whole number, and small enough that a table of ids can be built. */
export function isTokenId(json: Json): json is number {
  return typeof json === 'number' && Number.isInteger(json) && json >= 0 && json < 2 ** 24
}

export function tokenId(json: Json, at: string): number {
  if (isTokenId(json)) return json
  throw wrong(at, 'a token id', json)
}

export function optionalText(json: Json, at: string): string | undefined {
  return json === undefined || json === null ? undefined : text(json, at)
}

export function optionalBoolean(json: Json, fallback: boolean, at: string): boolean {
  if (json === undefined || json === null) return fallback
  if (typeof json === 'boolean') return json
  throw wrong(at, 'true or false', json)
}

/** The `type` of a component. */
export function kindOf(node: Readonly<Record<string, Json>>, at: string): string {
  return text(node['type'], `${at}.type`)
}

/** One of the names that a field may have. */
export function oneOf<T extends string>(json: Json, names: readonly T[], at: string): T {
  const found = names.find((name) => name === json)
  if (found !== undefined) return found
  throw wrong(at, `one of ${names.join(', ')}`, json)
}

export function wrong(at: string, wanted: string, got: Json): LatticeError {
  const shown = (JSON.stringify(got) ?? 'nothing').slice(0, 60)
  return new LatticeError('tokenizer_invalid', `${at} should be ${wanted}, not ${shown}.`, {
    todo: 'The tokenizer is damaged or of a kind not known; fetch the model again.',
    details: { field: at },
  })
}
