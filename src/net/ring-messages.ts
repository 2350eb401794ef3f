// Owns what the main thread and the ring thread say to each other. Prompts come over as bytes, once
// they are complete; answers go back as tokens and text.

import type { MessageCode, WireSampling } from './protocol.ts'

export interface RingThreadOptions {
  ifindex: number
  queue: number
  mode: 'copy' | 'zerocopy'
  /** Packets at a time that are taken from the driver by asking it again and again; 0 sleeps. */
  busyPollBudget: number
  /** By tenant: its two keys. */
  keys: ReadonlyMap<number, readonly [Uint8Array, Uint8Array]>
}

export type ToRing =
  | { kind: 'tokens'; id: number; ids: readonly number[]; text: string }
  | { kind: 'end'; id: number; code: MessageCode; outputTokens: number; cachedTokens: number }
  | { kind: 'close' }

export type FromRing =
  /** `fd` of the AF_XDP socket; `bell` of an eventfd that wakes the thread when written to. */
  | { kind: 'ready'; fd: number; bell: number }
  | {
      kind: 'start'
      id: number
      tenant: number
      prompt: Uint8Array
      chat: boolean
      raw: boolean
      maxTokens: number
      sampling: WireSampling
    }
  | { kind: 'abort'; id: number }
  | { kind: 'finished'; tenant: number; request: bigint; usedTokens: number }
  /** Frames that the kernel could not deliver, told when there are new ones. */
  | { kind: 'lost'; dropped: bigint; ringFull: bigint }
