// Owns what the main thread and the ring thread say to each other. Prompts come over as bytes, once
// they are complete; answers go back as tokens and text.

import type { LatticeErrorJson } from '../errors.ts'
import type { DirectNews, DirectOptions, DirectReport } from './direct-answers.ts'
import type { WireRequest } from './exchange.ts'
import type { MessageCode, WireUsage } from './protocol.ts'
import type { NetRing } from './ring-choice.ts'

export interface RingThreadOptions {
  ifindex: number
  /** Receive queues of the interface: a socket for each. */
  queues: readonly number[]
  mode: 'copy' | 'zerocopy'
  /** What puts prompts together. */
  ring: NetRing
  /** Requests that may be known at once. */
  flows: number
  /** Packets at a time that are taken from the driver by asking it again and again; 0 sleeps. */
  busyPollBudget: number
  /** Two words that both threads see: SAID and ASLEEP. */
  signal: SharedArrayBuffer
  /** By tenant: its two keys. */
  keys: ReadonlyMap<number, readonly [Uint8Array, Uint8Array]>
  /** An engine whose plain prompts the thread queues itself. */
  direct?: DirectOptions | undefined
}

/** Grows with every message to the ring thread. */
export const SAID = 0
/** 1 while that thread sleeps, or is about to: then only its bell wakes it. */
export const ASLEEP = 1

/** What went missing between the driver and us; the protocol's repeats make up for it. */
export interface RingLosses {
  /** Frames that the kernel had no room for. */
  received: number
  /** Frames that it did not take. */
  sent: number
}

export type ToRing =
  | { kind: 'tokens'; id: number; ids: readonly number[]; text: string }
  | { kind: 'end'; id: number; code: MessageCode; usage: WireUsage }
  | DirectNews
  /** Asks for `drained` once there is nothing left to say. */
  | { kind: 'drain' }
  | { kind: 'close' }

export type FromRing =
  /** A socket's descriptor for each queue; `bell` of an eventfd that wakes the thread. */
  | { kind: 'ready'; fds: number[]; bell: number; zeroCopy: boolean }
  | { kind: 'failed'; error: LatticeErrorJson }
  /** Requests of tenants, each at the same place; told before anything else of them. */
  | { kind: 'claimed'; tenants: readonly number[]; requests: BigUint64Array }
  | { kind: 'start'; id: number; wire: WireRequest }
  | { kind: 'abort'; id: number }
  | { kind: 'finished'; tenant: number; request: bigint; usedTokens: number }
  | DirectReport
  | { kind: 'lost'; losses: RingLosses }
  | { kind: 'drained' }
