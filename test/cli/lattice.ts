// Owns running the program in a test: a real process, whose output can be waited for.

import { type ChildProcessWithoutNullStreams, spawn } from 'node:child_process'
import { fileURLToPath } from 'node:url'

const MAIN = fileURLToPath(new URL('../../src/main.ts', import.meta.url))
const FAKE_MODEL = new URL('fake-model.ts', import.meta.url).href

export interface Ended {
  code: number | null
  signal: NodeJS.Signals | null
  stdout: string
  stderr: string
}

export interface Running {
  child: ChildProcessWithoutNullStreams
  /** Resolves when stdout or stderr holds the text; rejects if the program ends before. */
  says(text: string): Promise<void>
  ended: Promise<Ended>
}

/** Starts `lattice` with a fake model, its stdin a pipe that the test owns. */
export function start(args: readonly string[], env: NodeJS.ProcessEnv = {}): Running {
  const child = spawn(process.execPath, ['--import', FAKE_MODEL, MAIN, ...args], {
    env: { ...process.env, LATTICE_API_KEY: undefined, LATTICE_LOG: undefined, ...env },
  })
  let stdout = ''
  let stderr = ''
  child.stdout.setEncoding('utf8').on('data', (chunk: string) => (stdout += chunk))
  child.stderr.setEncoding('utf8').on('data', (chunk: string) => (stderr += chunk))
  child.stdin.on('error', () => {}) // the program may end without reading all of it
  const ended = new Promise<Ended>((resolve) => {
    child.on('close', (code, signal) => resolve({ code, signal, stdout, stderr }))
  })
  const says = (text: string): Promise<void> =>
    new Promise((resolve, reject) => {
      const look = (): void => {
        if (stdout.includes(text) || stderr.includes(text)) resolve()
      }
      child.stdout.on('data', look)
      child.stderr.on('data', look)
      void ended.then(() => reject(new Error(`ended without "${text}":\n${stdout}\n${stderr}`)))
      look()
    })
  return { child, says, ended }
}

/** Runs `lattice` to its end, with the given text on stdin. */
export function lattice(
  args: readonly string[],
  options: { stdin?: string; env?: NodeJS.ProcessEnv } = {},
): Promise<Ended> {
  const { child, ended } = start(args, options.env)
  child.stdin.end(options.stdin ?? '')
  return ended
}
