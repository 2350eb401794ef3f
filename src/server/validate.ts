// Owns how parameters are checked: small schema builders, and the error that names what is wrong.

import { z } from 'zod'
import { type ErrorCode, LatticeError } from '../errors.ts'

/** A field that may be left out; null means the same, as in OpenAI's API. */
export function optional<T>(schema: z.ZodType<T>) {
  return schema.nullish().transform((value) => value ?? undefined)
}

/** A number in [min, max], or (min, max] if `above` is set. */
export function number(min: number, max: number, options: { above?: boolean } = {}) {
  const range = options.above ? `above ${min} and at most ${max}` : `from ${min} to ${max}`
  return z.custom<number>(
    (value) =>
      typeof value === 'number' && (options.above ? value > min : value >= min) && value <= max,
    { error: expected(`a number ${range}`) },
  )
}

export function integer(min: number, max: number) {
  return z.custom<number>(
    (value) => Number.isInteger(value) && (value as number) >= min && (value as number) <= max,
    { error: expected(`a whole number from ${min} to ${max}`) },
  )
}

export const boolean = z.custom<boolean>((value) => typeof value === 'boolean', {
  error: expected('true or false'),
})

export const string = z.custom<string>((value) => typeof value === 'string', {
  error: expected('a string'),
})

/** One of a few strings. */
export function choice<const T extends string>(...allowed: T[]) {
  return z.custom<T>((value) => allowed.includes(value as T), {
    error: expected(allowed.map((value) => `"${value}"`).join(' or ')),
  })
}

/** A JSON object whose content is somebody else's business. */
export const record = z.custom<Record<string, unknown>>(
  (value) => typeof value === 'object' && value !== null && !Array.isArray(value),
  { error: expected('an object') },
)

/**
 * A parameter of OpenAI's API that would change the answer and that we do not have: only absence
 * and the values that ask for nothing are taken.
 */
export function unsupported(todo: string, ...neutral: unknown[]) {
  const neutralTexts = neutral.map((value) => JSON.stringify(value))
  return z
    .unknown()
    .superRefine((value, ctx) => {
      if (value === undefined || value === null) return
      if (neutralTexts.includes(JSON.stringify(value))) return
      refuse(ctx, 'unsupported_parameter', `is not supported. ${todo}`)
    })
    .optional()
}

/** Adds an issue under `path`; the message continues the parameter's name. */
export function refuse(
  ctx: z.core.$RefinementCtx<unknown>,
  code: ErrorCode,
  message: string,
  path: PropertyKey[] = [],
): void {
  ctx.addIssue({ code: 'custom', message, path, params: { code } })
}

/**
 * The parameters that `body` holds, by `schema`.
 * @throws LatticeError `unknown_parameter`, `unsupported_parameter`, `invalid_request`, each with
 *   the parameter's path in details.param
 */
export function parseParameters<T>(schema: z.ZodType<T>, body: Record<string, unknown>): T {
  const result = schema.safeParse(body)
  if (result.success) return result.data
  throw issueError(result.error.issues[0]!)
}

function issueError(issue: z.core.$ZodIssue): LatticeError {
  if (issue.code === 'unrecognized_keys') {
    const param = pathText([...issue.path, issue.keys[0]!])
    return new LatticeError('unknown_parameter', `There is no parameter '${param}'.`, {
      todo: 'docs/api.md lists the parameters.',
      details: { param },
    })
  }
  const param = pathText(issue.path)
  return new LatticeError(issueCode(issue), `'${param}' ${issueText(issue)}`, {
    details: { param },
  })
}

function issueCode(issue: z.core.$ZodIssue): ErrorCode {
  const code = issue.code === 'custom' ? (issue.params?.['code'] as ErrorCode) : undefined
  return code ?? 'invalid_request'
}

/** Our own checks word their messages; the rest is the shape of objects and arrays. */
function issueText(issue: z.core.$ZodIssue): string {
  if (issue.code === 'custom') return issue.message
  if (issue.code === 'invalid_type') return `must be ${withArticle(issue.expected)}.`
  if (issue.code === 'invalid_value') return `must be ${issue.values.map(show).join(' or ')}.`
  if (issue.code === 'too_small') return `must have at least ${issue.minimum} item(s).`
  if (issue.code === 'too_big') return `must have at most ${issue.maximum} item(s).`
  if (issue.code === 'invalid_union') return 'is none of the kinds that docs/api.md lists.'
  return `is wrong: ${issue.message}.`
}

function expected(what: string) {
  return (issue: { input?: unknown }): string =>
    issue.input === undefined
      ? `is missing; give ${what}.`
      : `must be ${what}, not ${show(issue.input)}.`
}

/** A value as an error shows it: short, and never a whole prompt. */
function show(value: unknown): string {
  if (Array.isArray(value)) return 'an array'
  if (typeof value === 'object' && value !== null) return 'an object'
  const text = JSON.stringify(value) ?? String(value)
  return text.length > 40 ? `${text.slice(0, 40)}…` : text
}

function withArticle(noun: string): string {
  return /^[aeiou]/.test(noun) ? `an ${noun}` : `a ${noun}`
}

function pathText(path: readonly PropertyKey[]): string {
  let text = ''
  for (const key of path) {
    if (typeof key === 'number') text += `[${key}]`
    else text += text === '' ? String(key) : `.${String(key)}`
  }
  return text
}
