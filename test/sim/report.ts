// Owns what is said of a seed that fails: where, with which sizes, what is needed for it, and the
// command that runs it again.

import { describeConfig } from './config.ts'
import { shrink, simulate, type SimOptions } from './simulate.ts'

const ENTRIES_MAX = 60

/** Runs a failing seed again and cuts it short for `limitMs`. */
export function report(options: SimOptions, limitMs = 10_000): string {
  const { failure, steps, config } = simulate(options)
  if (!failure) return `seed ${options.seed} does not fail again: something else is random`
  const { needed, all, result } = shrink(options, limitMs)
  const shown = needed.slice(-ENTRIES_MAX)
  return [
    `seed ${options.seed} fails in step ${steps}: ${failure.message}`,
    ...frames(result.failure),
    ...describeConfig(config).map((line) => `  ${line}`),
    `  what it takes (${needed.length} of ${all.length} happenings):`,
    ...(shown.length < needed.length ? [`    … ${needed.length - shown.length} more`] : []),
    ...shown.map(({ step, action }) => `    step ${step}: ${action.describe()}`),
    `  again: npm run sim -- --seed ${options.seed} --steps ${options.steps}`,
  ].join('\n')
}

/** The innermost places that have a name, without the assertion itself. */
function frames(failure: Error | undefined): string[] {
  const lines = failure?.stack?.split('\n').filter((line) => /^ {4}at /.test(line)) ?? []
  return lines.filter((line) => !line.includes('/assert.ts')).slice(0, 8)
}
