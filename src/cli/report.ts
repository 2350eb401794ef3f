// Owns how a failure looks in a terminal: what was wrong in red, what to do in yellow.

import { CommanderError } from 'commander'
import { styleText } from 'node:util'
import { LatticeError, toLatticeError } from '../errors.ts'

/** Exit code of a program that Ctrl-C ended: 128 + SIGINT. */
export const EXIT_INTERRUPTED = 130

/** Prints what was thrown; returns the exit code. Help and --version are thrown too, as success. */
export function report(thrown: unknown): number {
  if (thrown instanceof CommanderError && thrown.exitCode === 0) return 0
  if (thrown instanceof CommanderError && thrown.code === 'commander.help') return 2
  printError(thrown)
  return (thrown instanceof CommanderError ? usage(thrown) : toLatticeError(thrown)).exitCode
}

/** Prints an error in two lines, with the stack only under LATTICE_DEBUG=1. */
export function printError(thrown: unknown): void {
  const error = thrown instanceof CommanderError ? usage(thrown) : toLatticeError(thrown)
  const todo =
    error.todo ??
    (error.code === 'internal'
      ? 'This is a defect in Lattice: run it again with LATTICE_DEBUG=1 and report what it prints.'
      : undefined)
  const lines = [`${red('error:')} ${error.message}`]
  if (todo !== undefined) lines.push(yellow(`  → ${todo}`))
  if (process.env['LATTICE_DEBUG'] === '1') lines.push(stacks(thrown))
  process.stderr.write(`${lines.join('\n')}\n`)
}

/** Commander's errors read "error: WHAT\n(Did you mean X?)". */
function usage(error: CommanderError): LatticeError {
  const [what = '', suggestion] = error.message.replace(/^error: /, '').split('\n')
  // As other programs have it: `serve MODEL`.
  const model = /^too many arguments for '(serve|chat)'/.test(what)
  const help = model ? 'Name a model with --model.' : 'Add --help to see what is possible.'
  const todo = suggestion?.replace(/^\(|\)$/g, '') ?? help
  return new LatticeError('usage', what, { todo, cause: error })
}

function stacks(thrown: unknown): string {
  const own = thrown instanceof Error ? (thrown.stack ?? thrown.message) : String(thrown)
  const cause = thrown instanceof Error ? thrown.cause : undefined
  return cause === undefined ? own : `${own}\ncaused by: ${stacks(cause)}`
}

function red(text: string): string {
  return styleText(['red', 'bold'], text, { stream: process.stderr })
}

function yellow(text: string): string {
  return styleText('yellow', text, { stream: process.stderr })
}
