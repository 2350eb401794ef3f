// Owns asking a script of bench/ for the other side of a measurement, where Python can run it.

import { spawnSync } from 'node:child_process'
import { join } from 'node:path'
import { info } from '../log.ts'

const FOLDER = join(import.meta.dirname, '..', '..', 'bench')
const TIMEOUT_MS = 180_000

/**
 * @param script its name in bench/; takes JSON on stdin, and gives some in stdout's last line
 * @param name who is compared with, for the line that says why there is no comparison
 * @returns what the script gives, undefined where it cannot run
 */
export function askPython<T>(script: string, name: string, input: unknown): T | undefined {
  const { stdout, stderr, error, status } = spawnSync('python3', [join(FOLDER, script)], {
    input: JSON.stringify(input),
    encoding: 'utf8',
    timeout: TIMEOUT_MS,
  })
  if (!error && status === 0) return JSON.parse(stdout.trim().split('\n').at(-1) ?? '') as T
  const why = error?.message ?? stderr.trim().split('\n').at(-1) ?? `exit code ${status}`
  info(`no comparison with ${name}: ${why}`)
  return undefined
}
