// Owns how a decision of the ingress program is told to people and to other programs.

import type { MessageCode } from './protocol.ts'

/** A decision about a HELLO. */
export interface NetEvent {
  /** Counts from 1, over all that were told of since attaching. */
  number: number
  /** Unix time in milliseconds. */
  timeMs: number
  /** A repeat is a HELLO that was granted before and came again. */
  decision: 'grant' | 'repeat' | 'reject'
  /** Of a rejection. */
  code: MessageCode
  /** As 16 hex digits: a granted request has the same id in the engine and in the log. */
  request: string
  tenant: number
  /** Of a grant or repeat: index of the replica. */
  replica: number | undefined
  promptBytes: number
  maxTokens: number
  /** Of a rejection: when to ask again, 0 if that is not said. */
  retryMs: number
}

/** A request's number as logs and events have it. */
export function requestName(request: bigint): string {
  return request.toString(16).padStart(16, '0')
}

/**
 * @param tenant its name
 * @example 'granted 0123456789abcdef of seven: 5000 bytes and up to 100 tokens, engine 1'
 */
export function describeEvent(event: NetEvent, tenant: string): string {
  const { decision, code, request, replica, promptBytes, maxTokens, retryMs } = event
  const size = `${promptBytes} bytes and up to ${maxTokens} tokens`
  if (decision === 'reject') {
    const again = retryMs > 0 ? `, again after ${retryMs} ms` : ''
    return `rejected ${request} of ${tenant}: ${size}, ${code}${again}`
  }
  const granted = decision === 'grant' ? 'granted' : 'granted again'
  return `${granted} ${request} of ${tenant}: ${size}, engine ${replica}`
}
