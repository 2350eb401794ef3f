// Owns a simulation from its seed to its end: the seed decides everything, so that a failure can be
// run again, written down as a list of what happened, and cut to what is needed of it.

import { Random } from '../support/random.ts'
import { drawConfig, type SimConfig } from './config.ts'
import type { Action } from './operations/operation.ts'
import { OPERATIONS } from './operations/operations.ts'
import { type Coverage, type Parts, SOUND, World } from './world.ts'

/** What happened before the engine's step `step`; the first is 0. */
export interface Entry {
  step: number
  action: Action
}

export interface SimOptions {
  seed: number
  steps: number
  parts?: Parts
}

export interface SimResult {
  /** Engine steps that were run. */
  steps: number
  failure: Error | undefined
  coverage: Coverage
  config: SimConfig
}

/** What happens before a step, in order. */
type Source = (world: World, step: number) => Iterable<Action>

/** Runs `steps` steps of what the seed draws, then lets everything end. */
export function simulate(options: SimOptions, record?: Entry[]): SimResult {
  const random = new Random(options.seed)
  const config = drawConfig(random, OPERATIONS)
  return run(options, config, function* (world, step) {
    for (const operation of OPERATIONS) {
      if (!random.chance(rateOf(operation.name, world))) continue
      const action = operation.draw(world, random)
      if (!action) continue
      record?.push({ step, action })
      yield action
    }
  })
}

/** Finds a short list of happenings that fails in the same way, within a time. */
export function shrink(
  options: SimOptions,
  limitMs: number,
): { result: SimResult; needed: readonly Entry[]; all: readonly Entry[] } {
  const until = performance.now() + limitMs
  const all: Entry[] = []
  let result = simulate(options, all)
  let needed = all
  if (!result.failure) return { result, needed, all }
  const failure = kindOf(result.failure)
  for (let size = all.length; size >= 1; size = Math.ceil(size / 2)) {
    for (let from = Math.max(0, needed.length - size); from >= 0; from -= size) {
      if (performance.now() > until) return { result, needed, all }
      const fewer = needed.toSpliced(from, size)
      const shorter = replay({ ...options, steps: result.steps }, fewer)
      if (!shorter.failure || kindOf(shorter.failure) !== failure) continue
      result = shorter
      needed = fewer
    }
    if (size === 1) break
  }
  return { result, needed, all }
}

function replay(options: SimOptions, entries: readonly Entry[]): SimResult {
  const config = drawConfig(new Random(options.seed), OPERATIONS)
  let next = 0
  return run(options, config, function* (_world, step) {
    for (; entries[next]?.step === step; next++) yield entries[next]!.action
  })
}

function run({ steps, parts = SOUND }: SimOptions, config: SimConfig, source: Source): SimResult {
  const world = new World(config, parts)
  let failure: Error | undefined
  try {
    for (let step = 0; step < steps; step++) {
      for (const action of source(world, step)) action.run(world)
      world.advance()
    }
    world.finish()
  } catch (thrown) {
    failure = thrown instanceof Error ? thrown : new Error(String(thrown))
  }
  return { steps: world.steps, failure, coverage: world.coverage, config }
}

/** An engine with nothing to do would do nothing until somebody comes: they come at once. */
function rateOf(operation: string, { config, expected }: World): number {
  if (operation === 'submit' && expected.size === 0) return 1
  return config.rates.get(operation) ?? 0
}

/** The message without its numbers: which slot it was may change. */
function kindOf({ message }: Error): string {
  return message.replaceAll(/\d+/g, '#')
}
