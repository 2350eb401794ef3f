// Owns reading a model from disk, whatever its format.

import { LatticeError } from '../errors.ts'
import type { Model } from './model.ts'

export function openModel(_path: string): Model {
  throw new LatticeError('internal', 'not built yet')
}
