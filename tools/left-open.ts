// Owns the end of a test file that left something open, an engine's thread say: without it, its
// process would stay until CI gives up. Loaded before every test file.

import { after } from 'node:test'
import { isMainThread } from 'node:worker_threads'

/** More than any test needs to close what it opened; a process that can end does so at once. */
const GRACE_MS = 20_000

// Workers load this too; they end with their file.
if (isMainThread) after(atEnd)

function atEnd(): void {
  const timer = setTimeout(() => {
    const open = process.getActiveResourcesInfo().filter((name) => name !== 'Timeout')
    process.stderr.write(`${process.argv[1]} ends with something left open: ${open.join(', ')}\n`)
    process.exit(1)
  }, GRACE_MS)
  timer.unref()
}
