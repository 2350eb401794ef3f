// Owns what of a complete prompt is checked and read in the same way wherever it is answered.

import type { FinishReason } from '../engine/api.ts'
import type { ErrorCode, LatticeError } from '../errors.ts'
import type { WireRequest } from './exchange.ts'
import type { MessageCode } from './protocol.ts'

const ENDS = { stop: 'ok', length: 'length', abort: 'cancelled', error: 'failed' } as const

/** What a client can do something about; the rest is `failed`, and in the server's log. */
const CODES: Partial<Record<ErrorCode, MessageCode>> = {
  context_length_exceeded: 'context',
  kv_memory_exhausted: 'context',
  invalid_request: 'prompt',
  template_invalid: 'prompt',
  queue_full: 'busy',
  draining: 'no_replica',
  engine_stopped: 'no_replica',
}

/** How an answer ended, in the protocol's words. */
export function endCode(reason: FinishReason, error: LatticeError | undefined): MessageCode {
  return error ? errorCode(error) : ENDS[reason]
}

export function errorCode(error: LatticeError): MessageCode {
  return CODES[error.code] ?? 'failed'
}

/** What the ingress program does not look at; NaN is outside. */
export function isWithinBounds({
  maxTokens,
  sampling: { temperature, topP },
}: WireRequest): boolean {
  return maxTokens >= 1 && temperature >= 0 && temperature < Infinity && topP > 0 && topP <= 1
}

/** As many bits as a number holds exactly, whatever the choice adds to it. */
export function seedOf(seed: bigint): number {
  return Number(BigInt.asUintN(52, seed))
}

const UTF8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })

/** Undefined if it is no UTF-8. */
export function decode(prompt: Uint8Array): string | undefined {
  try {
    return UTF8.decode(prompt)
  } catch {
    return undefined
  }
}
