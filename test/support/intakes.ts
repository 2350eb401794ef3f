// Owns the two intakes of prompts, for tests that hold both to the same.

import { whyNotNative } from '../../src/ffi/native-ring.ts'
import {
  type Intake,
  type IntakeEvents,
  type IntakeLimits,
  type IntakeWorld,
  TypeScriptIntake,
} from '../../src/net/intake.ts'
import { NativeIntake } from '../../src/net/native-intake.ts'
import type { NetRing } from '../../src/net/ring-choice.ts'
import { sipKey } from '../../src/net/siphash.ts'

const FLOWS = 4096

/** Why its tests are skipped; false if they are not. */
export function without(ring: NetRing): string | false {
  const why = ring === 'native' ? whyNotNative() : undefined
  return why === undefined ? false : `SKIPPED: ${why}`
}

/** @param keys by tenant: its two */
export function openIntake(
  ring: NetRing,
  keys: ReadonlyMap<number, readonly [Uint8Array, Uint8Array]>,
  world: IntakeWorld,
  events: IntakeEvents,
  limits?: IntakeLimits,
): Intake {
  if (ring === 'native') {
    return new NativeIntake({ flows: FLOWS, keys, ...(limits && { limits }) }, events, world)
  }
  const known = (tenant: number, index: number) => {
    const bytes = keys.get(tenant)?.[index]
    return bytes && sipKey(bytes)
  }
  return new TypeScriptIntake(known, world, events, limits)
}
