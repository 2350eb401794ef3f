// Owns reading the JSON files beside a model's weights: bounded, and typed key by key.

import { LatticeError } from '../errors.ts'
import { MODEL_MAX_JSON_BYTES } from '../limits.ts'
import { withFile } from './byte-source.ts'

/**
 * Parses a JSON file.
 * @throws LatticeError `model_not_found`, or `safetensors_invalid` when it is no JSON
 */
export function readJson(path: string): unknown {
  const text = withFile(path, (source) => {
    if (source.byteLength > MODEL_MAX_JSON_BYTES) {
      throw badJson(path, `has ${source.byteLength} bytes, more than ${MODEL_MAX_JSON_BYTES}`)
    }
    const bytes = Buffer.alloc(source.byteLength)
    source.read(bytes, 0)
    return bytes.toString('utf8')
  })
  try {
    return JSON.parse(text)
  } catch (thrown) {
    throw badJson(path, `is no JSON: ${(thrown as Error).message}`)
  }
}

function badJson(path: string, what: string): LatticeError {
  return new LatticeError('safetensors_invalid', `${path} ${what}.`, {
    todo: 'Download the file again.',
    details: { file: path },
  })
}

export function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

/** An object of a JSON file whose keys are read as what they must be; null counts as absent. */
export class JsonObject {
  readonly path: string
  private readonly values: Record<string, unknown>
  private readonly at: string

  /** @param at the object's own key in the file, for messages; '' for the outermost */
  constructor(values: unknown, path: string, at = '') {
    if (!isObject(values)) throw badJson(path, `holds no object${at && ` at ${at}`}`)
    this.values = values
    this.path = path
    this.at = at
  }

  has(key: string): boolean {
    return this.get(key) !== undefined
  }

  get(key: string): unknown {
    return Object.hasOwn(this.values, key) ? (this.values[key] ?? undefined) : undefined
  }

  /** Whether the file says null, where null and absence differ. */
  isNull(key: string): boolean {
    return Object.hasOwn(this.values, key) && this.values[key] === null
  }

  text(key: string): string | undefined {
    return this.typed(key, 'a string', (value) => typeof value === 'string') as string | undefined
  }

  flag(key: string): boolean | undefined {
    return this.typed(key, 'a boolean', (value) => typeof value === 'boolean') as
      | boolean
      | undefined
  }

  number(key: string): number | undefined {
    return this.typed(key, 'a number', (value) => typeof value === 'number') as number | undefined
  }

  object(key: string): JsonObject | undefined {
    const value = this.get(key)
    return value === undefined ? undefined : new JsonObject(value, this.path, this.full(key))
  }

  /** A number that must be there. */
  need(key: string): number {
    const value = this.number(key)
    if (value === undefined) throw badJson(this.path, `lacks ${this.full(key)}`)
    return value
  }

  private typed(key: string, what: string, test: (value: unknown) => boolean): unknown {
    const value = this.get(key)
    if (value === undefined || test(value)) return value
    throw badJson(this.path, `has ${this.full(key)}, but it is not ${what}`)
  }

  private full(key: string): string {
    return this.at === '' ? key : `${this.at}.${key}`
  }
}
