// Owns what the kernel says of the machine's shortage of memory: pressure stall information
// (PSI, the kernel's Documentation/accounting/psi.rst).

import { readFileSync } from 'node:fs'
import { join } from 'node:path'

/**
 * Percent of the last ten seconds in which some task waited for memory; undefined where the kernel
 * does not say.
 * @param root where /proc is; tests give a folder of their own
 */
export function memoryPressure(root = '/'): number | undefined {
  let text: string
  try {
    text = readFileSync(join(root, 'proc/pressure/memory'), 'utf8')
  } catch {
    return undefined
  }
  const match = /^some avg10=(\d+(?:\.\d+)?)/m.exec(text)
  return match ? Number(match[1]) : undefined
}
