// Owns directories that tests write into: they go when the test's process ends.

import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

const made: string[] = []

process.on('exit', () => {
  for (const path of made) rmSync(path, { recursive: true, force: true })
})

/** A fresh directory. */
export function temporaryDirectory(what: string): string {
  const path = mkdtempSync(join(tmpdir(), `lattice-${what}-`))
  made.push(path)
  return path
}
