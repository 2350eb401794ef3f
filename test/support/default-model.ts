// Owns where tests find the default model: `npm test` pulls it before they start and says where.

import { existsSync } from 'node:fs'

export const WITHOUT_MODEL =
  'SKIPPED: the default model is not here; `npm test` pulls it, or run `bin/lattice pull` once'

/** The default model's file, or undefined where it could not be had. */
export function defaultModelPath(): string | undefined {
  const path = process.env['LATTICE_TEST_MODEL']
  return path !== undefined && existsSync(path) ? path : undefined
}
