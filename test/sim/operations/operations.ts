// Owns the list of what can happen to a simulated engine.

import { abort } from './abort.ts'
import { beams } from './beams.ts'
import { clock } from './clock.ts'
import { giveBack, take, takeBefore } from './contend.ts'
import { failingDisk, slowDisk } from './disk.ts'
import { fail } from './fail.ts'
import type { Operation } from './operation.ts'
import { pin, unpin } from './pin.ts'
import { poison } from './poison.ts'
import { refuse } from './refuse.ts'
import { moveSession, relieve } from './sessions.ts'
import { settle } from './settle.ts'
import { snapshot } from './snapshot.ts'
import { submit } from './submit.ts'

export const OPERATIONS: readonly Operation[] = [
  submit,
  beams,
  refuse,
  abort,
  clock,
  settle,
  snapshot,
  pin,
  unpin,
  moveSession,
  relieve,
  poison,
  slowDisk,
  failingDisk,
  take,
  takeBefore,
  giveBack,
  fail,
]
