// Owns finding a model by name or source.

import { LatticeError } from '../errors.ts'

export function resolveModel(_nameOrSource: string | undefined): Promise<{
  id: string
  path: string
}> {
  throw new LatticeError('internal', 'not built yet')
}
