// Owns what `lattice top` shows of time: rates and hits, found by comparing answers of a server.

import type { EngineSnapshot } from '../engine/api.ts'
import type { KvMap } from '../kv/map.ts'

/** What GET /debug/kv answers. */
export interface KvReport {
  model: string
  engine: EngineSnapshot
  kv: KvMap
}

export interface Sample {
  atMs: number
  report: KvReport
}

export interface Rates {
  outputPerS: number
  promptPerS: number
  /** Of the prompt tokens asked for in this time, how many were found; undefined if none were. */
  hit: number | undefined
  /** Share of the time that the engine computed. */
  busy: number
}

/** How long rates look back. */
const WINDOW_MS = 10_000

/** What was seen lately, the latest last; a server that began anew begins anew here. */
export class Samples {
  private readonly list: Sample[] = []

  add(sample: Sample): void {
    const last = this.list.at(-1)
    if (last && sample.report.engine.steps < last.report.engine.steps) this.list.length = 0
    this.list.push(sample)
    while ((this.list[1]?.atMs ?? Infinity) < sample.atMs - WINDOW_MS) this.list.shift()
  }

  /** Undefined before the second sample. */
  rates(): Rates | undefined {
    const [first, last] = [this.list[0], this.list.at(-1)]
    if (!first || !last || last.atMs <= first.atMs) return undefined
    const [before, now] = [first.report.engine, last.report.engine]
    const seconds = (last.atMs - first.atMs) / 1000
    const asked = now.prefixQueries - before.prefixQueries
    return {
      outputPerS: (now.outputTokens - before.outputTokens) / seconds,
      promptPerS: (now.promptTokens - before.promptTokens) / seconds,
      hit: asked > 0 ? (now.prefixHits - before.prefixHits) / asked : undefined,
      busy: Math.min(1, (now.stepMs - before.stepMs) / 1000 / seconds),
    }
  }
}
