// Owns running the user's own package tools: their output is read, and shown only if they fail.

import { spawn } from 'node:child_process'
import { createInterface } from 'node:readline'

export interface Finished {
  code: number
  stdout: string
  stderr: string
}

/**
 * Runs a program to its end.
 * @param onLine gets each line of stdout as it comes
 * @returns undefined when there is no such program (or only a shim that finds none)
 */
export async function runCommand(
  command: readonly string[],
  options: {
    directory: string
    env?: Readonly<Record<string, string>>
    signal?: AbortSignal | undefined
    onLine?: (line: string) => void
  },
): Promise<Finished | undefined> {
  const [program = '', ...args] = command
  options.signal?.throwIfAborted()
  const child = spawn(program, args, {
    cwd: options.directory,
    env: { ...process.env, ...options.env },
    stdio: ['ignore', 'pipe', 'pipe'],
    signal: options.signal,
  })
  const stdout: string[] = []
  let stderr = ''
  createInterface({ input: child.stdout }).on('line', (line) => {
    stdout.push(line)
    options.onLine?.(line)
  })
  child.stderr.setEncoding('utf8').on('data', (text: string) => (stderr += text))
  const code = await new Promise<number | undefined>((resolve, reject) => {
    child.on('error', (error: NodeJS.ErrnoException) =>
      error.code === 'ENOENT' || error.code === 'EACCES' ? resolve(undefined) : reject(error),
    )
    child.on('close', (exit) => resolve(exit ?? 1))
  })
  options.signal?.throwIfAborted()
  // 126 and 127 are how shells and shims say that a program is not there.
  if (code === undefined || code === 126 || code === 127) return undefined
  return { code, stdout: stdout.join('\n'), stderr }
}
