// Owns the choice of what puts prompts together: the native ring, or the one in TypeScript.

import { whyNotNative } from '../ffi/native-ring.ts'
import { refused } from './interface.ts'

export const NET_RINGS = ['native', 'typescript'] as const
export type NetRing = (typeof NET_RINGS)[number]

export interface RingChoice {
  ring: NetRing
  /** Why it is not the native one, if nobody asked for the other. */
  why?: string
}

/**
 * @param asked undefined: the native one if it can be loaded here
 * @param whyNot says why it cannot
 * @throws LatticeError `net_refused` if it is asked for and cannot
 */
export function chooseRing(asked: NetRing | undefined, whyNot = whyNotNative): RingChoice {
  if (asked === 'typescript') return { ring: asked }
  const why = whyNot()
  if (why === undefined) return { ring: 'native' }
  if (asked === undefined) return { ring: 'typescript', why }
  throw refused(`The native ring cannot be loaded: ${why}`, 'Take --net-ring typescript.')
}
