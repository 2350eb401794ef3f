// Owns what the engine says of itself between two steps: its counters, its queues, its memory.

import type { KvMemory } from '../backends/backend.ts'
import type { SlotTable } from '../kv/slots.ts'
import type { Scheduler } from '../scheduler/scheduler.ts'
import type { EngineSnapshot, FinishReason } from './api.ts'
import type { Offload } from './offload.ts'
import type { Sequence } from './sequence.ts'
import type { PromptSharing } from './sharing.ts'

/** What has happened since the start. */
export class EngineCounts {
  steps = 0
  promptTokens = 0
  outputTokens = 0
  computeMs = 0
  stepMs = 0
  readonly finished: Record<FinishReason, number> = { stop: 0, length: 0, abort: 0, error: 0 }

  stepped(computeMs: number): void {
    this.steps++
    this.computeMs += computeMs
  }
}

export interface EngineParts {
  kv: KvMemory
  slots: SlotTable
  scheduler: Scheduler<Sequence>
  sharing: PromptSharing
  offload: Offload | undefined
  counts: EngineCounts
}

export function snapshotOf(parts: EngineParts, now: number): EngineSnapshot {
  const { kv, slots, scheduler, sharing, offload: tiers, counts } = parts
  const { layout } = kv
  const { cachedPages, prefixLimitPages, pinnedPages, evictions } = sharing.gauges
  const all = [...scheduler.running, ...scheduler.waiting]
  const sequences = all.map((sequence) => sequence.snapshot(slots, now))
  const { offload, recompute } = scheduler.preemptions
  const { steps, promptTokens, outputTokens, computeMs, stepMs, finished } = counts
  return {
    sequences,
    running: scheduler.running.length,
    waiting: scheduler.waiting.length,
    kv: {
      pageBytes: layout.shape.pageBytes,
      usedPages: slots.usedPages,
      limitPages: slots.limitPages,
      residentBytes: kv.residentBytes(),
      cachedPages,
      pinnedPages,
      prefixLimitPages,
    },
    prefixQueries: sharing.queries,
    prefixHits: sharing.hits,
    prefixEvictions: evictions,
    steps,
    promptTokens,
    outputTokens,
    finished: { ...finished },
    preemptions: offload + recompute,
    ...(tiers && { tier: tiers.snapshot(offload, scheduler.imagesLost) }),
    beamCopies: slots.compactions,
    computeMs,
    stepMs,
  }
}
