// Owns how option values are read: sizes, counts and numbers, each refused with what would do.

import { InvalidArgumentError } from 'commander'

const UNITS = ['', 'K', 'M', 'G', 'T']

/**
 * A size in bytes. Units are powers of 1024: 512M, 512MB and 512MiB are the same.
 *
 * @example parseSize('1.5GiB') // 1610612736
 */
export function parseSize(text: string): number {
  const match = /^(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?|B)?$/i.exec(text.trim())
  const size = Math.round(
    Number(match?.[1]) * 1024 ** UNITS.indexOf(match?.[2]?.toUpperCase() ?? ''),
  )
  if (!Number.isSafeInteger(size) || size < 1) {
    throw new InvalidArgumentError('Write a size such as 512M, 32K or 1.5GiB (powers of 1024).')
  }
  return size
}

/**
 * A number of tokens, with K for 1024.
 *
 * @example parseTokens('8K') // 8192
 */
export function parseTokens(text: string): number {
  const match = /^(\d+)(K?)$/i.exec(text.trim())
  const tokens = Number(match?.[1]) * (match?.[2] ? 1024 : 1)
  if (Number.isSafeInteger(tokens) && tokens >= 1) return tokens
  throw new InvalidArgumentError('Write a number of tokens such as 8192 or 32K (32 × 1024).')
}

/**
 * A size, and after a colon where, if that is said.
 *
 * @example parsePlace('8GiB:/mnt/nvme') // { bytes: 8589934592, path: '/mnt/nvme' }
 */
export function parsePlace(text: string): { bytes: number; path?: string } {
  const colon = text.indexOf(':')
  if (colon < 0) return { bytes: parseSize(text) }
  const path = text.slice(colon + 1)
  if (path === '') throw new InvalidArgumentError('Write a directory after the colon, or no colon.')
  return { bytes: parseSize(text.slice(0, colon)), path }
}

/**
 * Two percentages, the upper one first, as fractions.
 *
 * @example parseWatermarks('90:80') // { high: 0.9, low: 0.8 }
 */
export function parseWatermarks(text: string): { high: number; low: number } {
  const [high = NaN, low = NaN] = (/^(\d+):(\d+)$/.exec(text.trim()) ?? []).slice(1).map(Number)
  if (high <= 100 && low <= high) return { high: high / 100, low: low / 100 }
  throw new InvalidArgumentError('Write two percentages, the upper one first, such as 90:80.')
}

/**
 * A rate a second, and after a colon how many at once after a rest; a second's worth if not said.
 *
 * @example parseRate('20:100') // { perSecond: 20, burst: 100 }
 */
export function parseRate(text: string): { perSecond: number; burst: number } {
  const [, rate, most] = /^(\d+(?:\.\d+)?)(?::(\d+))?$/.exec(text.trim()) ?? []
  const perSecond = Number(rate)
  const burst = Number(most ?? Math.ceil(perSecond))
  if (perSecond >= 0.01 && perSecond <= 1e7 && burst >= 1 && burst <= 1e6) {
    return { perSecond, burst }
  }
  throw new InvalidArgumentError(
    'Write a rate a second from 0.01 to 10000000, and if you like how many at once, up to ' +
      '1000000: 20:100.',
  )
}

/** A reader of whole numbers from `min` to `max`, both included. */
export function parseCount(min: number, max = Number.MAX_SAFE_INTEGER): (text: string) => number {
  return (text) => {
    const count = /^-?\d+$/.test(text.trim()) ? Number(text) : NaN
    if (count >= min && count <= max) return count
    throw new InvalidArgumentError(`Write a whole number ${range(min, max)}.`)
  }
}

/** A reader of numbers from `min` to `max`, both included. */
export function parseNumber(min: number, max: number): (text: string) => number {
  return (text) => {
    const value = text.trim() === '' ? NaN : Number(text)
    if (value >= min && value <= max) return value
    throw new InvalidArgumentError(`Write a number ${range(min, max)}.`)
  }
}

/** An address such as http://127.0.0.1:8080, without the slash at its end. */
export function parseUrl(text: string): string {
  if (!URL.canParse(text) || !/^https?:$/.test(new URL(text).protocol)) {
    throw new InvalidArgumentError('Write an address such as http://127.0.0.1:8080.')
  }
  return text.replace(/\/+$/, '')
}

/** Collects what browsers call origins: a scheme and a host, perhaps a port; or * for all. */
export function collectOrigin(text: string, before: readonly string[] | undefined): string[] {
  const isOrigin = text === '*' || (URL.canParse(text) && new URL(text).origin === text)
  if (isOrigin) return collect(text, before)
  throw new InvalidArgumentError('Write an origin such as http://localhost:3000, or *.')
}

/** Collects the values of an option that may be repeated. */
export function collect(text: string, before: readonly string[] | undefined): string[] {
  return [...(before ?? []), text]
}

function range(min: number, max: number): string {
  if (max >= Number.MAX_SAFE_INTEGER) return `of at least ${min}`
  return `from ${min} to ${max}`
}
