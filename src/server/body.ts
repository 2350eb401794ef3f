// Owns how a request's body becomes a JSON object: its type, size, encoding, syntax and depth.

import { LatticeError } from '../errors.ts'
import { MAX_BODY_BYTES, MAX_JSON_DEPTH } from '../limits.ts'
import type { RouteContext } from './context.ts'

/**
 * The JSON object that a request carries.
 * @throws LatticeError `unsupported_media_type`, `body_too_large`, `invalid_request`
 */
export async function readJson(c: RouteContext): Promise<Record<string, unknown>> {
  checkHead(c)
  const value = parse(decode(await readBytes(c.req.raw)))
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw new LatticeError('invalid_request', 'The body must be a JSON object.')
  }
  checkDepth(value, 1)
  return value as Record<string, unknown>
}

/**
 * What can be said of a body before it is read.
 * @throws LatticeError `unsupported_media_type`, `body_too_large`
 */
export function checkHead(c: RouteContext): void {
  checkMediaType(c)
  if (Number(c.req.header('content-length') ?? 0) > MAX_BODY_BYTES) throw tooLarge()
}

function checkMediaType(c: RouteContext): void {
  const type = c.req.header('content-type') ?? ''
  if (!/^application\/json *(; *charset=("utf-8"|utf-8) *)?$/i.test(type)) {
    const given = type === '' ? 'no Content-Type' : `Content-Type ${type}`
    throw new LatticeError('unsupported_media_type', `The request has ${given}.`, {
      todo: 'Send Content-Type: application/json.',
    })
  }
  const encoding = c.req.header('content-encoding') ?? 'identity'
  if (encoding.toLowerCase() !== 'identity') {
    throw new LatticeError('unsupported_media_type', `Content-Encoding ${encoding} is not read.`, {
      todo: 'Send the body uncompressed.',
    })
  }
}

async function readBytes(request: Request): Promise<Uint8Array> {
  try {
    // A body of announced length is read at once; a chunked one is counted as it comes.
    const bytes =
      request.headers.get('content-length') === null
        ? await readChunks(request)
        : new Uint8Array(await request.arrayBuffer())
    if (bytes.length > MAX_BODY_BYTES) throw tooLarge()
    return bytes
  } catch (error) {
    if (error instanceof LatticeError) throw error
    throw new LatticeError('invalid_request', 'The body broke off.', { cause: error })
  }
}

async function readChunks(request: Request): Promise<Uint8Array> {
  const chunks: Uint8Array[] = []
  let length = 0
  for await (const chunk of request.body ?? []) {
    length += chunk.length
    if (length > MAX_BODY_BYTES) throw tooLarge()
    chunks.push(chunk)
  }
  return Buffer.concat(chunks, length)
}

function tooLarge(): LatticeError {
  return new LatticeError('body_too_large', `The body is over ${MAX_BODY_BYTES} bytes.`, {
    todo: 'Send a shorter prompt, or several requests.',
  })
}

function decode(bytes: Uint8Array): string {
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes)
  } catch {
    throw new LatticeError('invalid_request', 'The body is not valid UTF-8.')
  }
}

function parse(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch (error) {
    const why = error instanceof Error ? error.message : String(error)
    throw new LatticeError('invalid_request', `The body is not valid JSON: ${why}.`)
  }
}

function checkDepth(value: object, depth: number): void {
  if (depth > MAX_JSON_DEPTH) {
    throw new LatticeError('invalid_request', `The body nests deeper than ${MAX_JSON_DEPTH}.`)
  }
  const children = Array.isArray(value) ? value : Object.values(value)
  for (const child of children) {
    if (typeof child === 'object' && child !== null) checkDepth(child, depth + 1)
  }
}
