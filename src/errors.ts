// Owns every error a user can meet: one registry of codes, one class that carries them.
// A code is stable; docs/errors.md documents each, and a test keeps the two lists equal.

/** HTTP status and process exit code by error code. Exit codes: 1 failure, 2 usage, 3 not found. */
export const ERROR_CODES = {
  internal: { status: 500, exit: 1 },
  usage: { status: 400, exit: 2 },
  invalid_request: { status: 400, exit: 2 },
  unknown_parameter: { status: 400, exit: 2 },
  unsupported_parameter: { status: 400, exit: 2 },
  context_length_exceeded: { status: 400, exit: 2 },
  unauthorized: { status: 401, exit: 1 },
  model_not_found: { status: 404, exit: 3 },
  not_found: { status: 404, exit: 3 },
  body_too_large: { status: 413, exit: 2 },
  unsupported_media_type: { status: 415, exit: 2 },
  queue_full: { status: 429, exit: 1 },
  draining: { status: 503, exit: 1 },
  server_unreachable: { status: 502, exit: 1 },
  request_rejected: { status: 503, exit: 1 },
  engine_stopped: { status: 503, exit: 1 },
  kv_lost: { status: 500, exit: 1 },
  kv_memory_exhausted: { status: 400, exit: 1 },
  kv_store_invalid: { status: 500, exit: 1 },
  prefix_memory_exhausted: { status: 409, exit: 1 },
  session_busy: { status: 409, exit: 1 },
  download_failed: { status: 502, exit: 1 },
  hash_mismatch: { status: 502, exit: 1 },
  gguf_invalid: { status: 500, exit: 1 },
  safetensors_invalid: { status: 500, exit: 1 },
  model_unsupported: { status: 500, exit: 1 },
  tokenizer_invalid: { status: 500, exit: 1 },
  template_invalid: { status: 400, exit: 1 },
  backend_unavailable: { status: 500, exit: 1 },
  backend_failed: { status: 500, exit: 1 },
  gpu_call_failed: { status: 500, exit: 1 },
  gpu_memory_taken: { status: 503, exit: 1 },
  kernel_compile_failed: { status: 500, exit: 1 },
  pager_failed: { status: 503, exit: 1 },
  net_refused: { status: 409, exit: 1 },
  os_call_failed: { status: 500, exit: 1 },
} as const satisfies Record<string, { status: number; exit: number }>

export type ErrorCode = keyof typeof ERROR_CODES

/** The details a caller may act on, such as the parameter's name or a byte offset. */
export type ErrorDetails = Readonly<Record<string, string | number | boolean | null>>

/**
 * An error with a stable code, what was wrong, and what to do about it.
 *
 * @example throw new LatticeError('context_length_exceeded', 'The prompt has 9000 tokens; …', {
 *   todo: 'Shorten the prompt or start with --context 16384.', details: { param: 'messages' } })
 */
export class LatticeError extends Error {
  readonly code: ErrorCode
  readonly todo: string | undefined
  readonly details: ErrorDetails

  constructor(
    code: ErrorCode,
    what: string,
    options: { todo?: string; details?: ErrorDetails; cause?: unknown } = {},
  ) {
    super(what, options.cause === undefined ? undefined : { cause: options.cause })
    this.name = 'LatticeError'
    this.code = code
    this.todo = options.todo
    this.details = options.details ?? {}
  }

  get status(): number {
    return ERROR_CODES[this.code].status
  }

  get exitCode(): number {
    return ERROR_CODES[this.code].exit
  }

  /** A plain object that survives structured clone between threads; `fromJSON` restores it. */
  toJSON(): LatticeErrorJson {
    return { code: this.code, what: this.message, todo: this.todo, details: this.details }
  }

  static fromJSON(json: LatticeErrorJson): LatticeError {
    return new LatticeError(json.code, json.what, {
      ...(json.todo === undefined ? {} : { todo: json.todo }),
      details: json.details,
    })
  }
}

export interface LatticeErrorJson {
  code: ErrorCode
  what: string
  todo: string | undefined
  details: ErrorDetails
}

/** Wraps anything thrown as a LatticeError; what is one already passes through. */
export function toLatticeError(thrown: unknown): LatticeError {
  if (thrown instanceof LatticeError) return thrown
  const message = thrown instanceof Error ? thrown.message : String(thrown)
  return new LatticeError('internal', message, { cause: thrown })
}
