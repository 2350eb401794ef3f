// Owns what the program says on stderr: one line an event, quiet under tests.

import { styleText } from 'node:util'

const quiet = process.env['LATTICE_LOG'] === 'off'

/** Says what happens, to a person who watches. */
export function info(message: string): void {
  if (!quiet) process.stderr.write(`${message}\n`)
}

/** Says what a person should know and may want to change. */
export function warn(message: string): void {
  if (!quiet)
    process.stderr.write(
      `${styleText('yellow', 'warning:', { stream: process.stderr })} ${message}\n`,
    )
}
