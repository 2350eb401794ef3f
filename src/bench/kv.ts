// Owns the comparison of memory managers on one trace: what each holds, wastes, copies and finds.

import { BlocksModel } from './kv-blocks.ts'
import { LatticeModel } from './kv-lattice.ts'
import { type KvModel, StaticModel, TokensModel } from './kv-model.ts'
import { kvTrace, type KvWork } from './kv-trace.ts'

export interface KvBenchOptions {
  seed: number
  /** Tokens of cached prefixes that managers may keep without a sequence. */
  cachedTokens: number
}

/** What a manager made of a kind of work. */
export interface KvResult {
  work: string
  manager: string
  /** Most bytes that running sequences held at the end of a step, and the mean over steps. */
  peakBytes: number
  meanBytes: number
  /** Mean over steps of 1 − bytes of distinct tokens / bytes held; copies of a token are waste. */
  waste: number
  copiedBytes: number
  /** Prompt tokens asked for, and found in memory. */
  promptTokens: number
  foundTokens: number
}

type Manager = readonly [name: string, make: () => KvModel]

export function runKvBench({ seed, cachedTokens }: KvBenchOptions): KvResult[] {
  const managers: readonly Manager[] = [
    ['static reservation', () => new StaticModel()],
    ['blocks of 16 tokens', () => new BlocksModel(cachedTokens)],
    ['lattice', () => new LatticeModel(cachedTokens)],
  ]
  return kvTrace(seed).flatMap((work) =>
    managers.map(([manager, make]) => ({ work: work.name, manager, ...replay(work, make()) })),
  )
}

/** Runs a kind of work through a manager, beside the tokens that there really are. */
export function replay(work: KvWork, model: KvModel): Omit<KvResult, 'work' | 'manager'> {
  const tokens = new TokensModel()
  const result = { peakBytes: 0, meanBytes: 0, waste: 0, promptTokens: 0, foundTokens: 0 }
  let steps = 0
  for (const acts of work.steps) {
    for (const act of acts) {
      if (act.kind === 'begin') {
        result.promptTokens += act.prompt.length
        result.foundTokens += model.begin(act.id, act.prompt)
        tokens.begin(act.id, act.prompt)
      } else if (act.kind === 'append') {
        model.append(act.id, act.token)
        tokens.append(act.id, act.token)
      } else if (act.kind === 'fork') {
        model.fork(act.id, act.from)
        tokens.fork(act.id, act.from)
      } else {
        model.end(act.id)
        tokens.end(act.id)
      }
    }
    const held = model.heldBytes()
    if (held === 0) continue
    steps++
    result.peakBytes = Math.max(result.peakBytes, held)
    result.meanBytes += (held - result.meanBytes) / steps
    result.waste += (1 - tokens.heldBytes() / held - result.waste) / steps
  }
  return { ...result, copiedBytes: model.copiedBytes }
}
