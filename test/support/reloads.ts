// Owns what tests of reloads share: sessions that somebody moves by hand, a count of what was on
// its way back into memory that was refused, and what must be so once nobody refuses it.

import assert from 'node:assert/strict'
import type { HashingBackend } from './hashing-backend.ts'
import type { Bench } from './null-engine.ts'
import type { Random } from './random.ts'

export interface Undone {
  sequences: number
  prefixes: number
}

interface Insides {
  tiers: { stop(image: unknown, refused: boolean): void }
  cold: { undo(region: number): void; coming: ReadonlyMap<number, unknown> } | undefined
}

/** Counts what was on its way back and stayed outside, of each kind. */
export function countUndone({ core }: Bench, into: Undone): void {
  const { tiers, cold } = (core as unknown as { offload: Insides }).offload
  const stop = tiers.stop.bind(tiers)
  tiers.stop = (image, refused) => {
    if (refused) into.sequences++
    stop(image, refused)
  }
  const undo = cold?.undo.bind(cold)
  if (!cold || !undo) return
  cold.undo = (region) => {
    if (cold.coming.has(region)) into.prefixes++
    undo(region)
  }
}

/** Somebody moves a third of the sessions, back if they are outside. */
export function moveSome({ core }: Bench, random: Random): void {
  for (const tenant of ['a', 'b']) {
    for (const { id, outPages } of core.answer({ kind: 'sessions', tenant })) {
      if (random.below(3) > 0) continue
      core.answer({ kind: outPages > 0 ? 'reload' : 'offload', tenant, id })
    }
  }
}

/** Nobody takes memory any more: the engine and its backend may have all of it again. */
export function endUnlimited(engine: Bench, gpu: HashingBackend, kvPages: number): void {
  // A refusal from before may come late, and is noticed first.
  for (const _ of [1, 2]) {
    engine.nowMs += 1000
    gpu.kv.drain()
    engine.step()
  }
  engine.settle()
  assert.equal(engine.core.snapshot().kv.limitPages, kvPages, 'the limit is what it was')
  gpu.close()
}
