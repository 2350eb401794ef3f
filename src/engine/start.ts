// Owns starting an engine on a model file.

import { LatticeError } from '../errors.ts'
import type { Engine } from './api.ts'

export interface StartOptions {
  modelId: string
  device: 'cpu' | 'auto'
  threads?: number
  contextLength?: number
  kvMemoryBytes?: number
  maxSequences?: number
  maxQueue?: number
  stepTokens?: number
}

export function startEngine(
  _modelPath: string,
  _options: StartOptions,
): Promise<{ engine: Engine; report: string[] }> {
  throw new LatticeError('internal', 'not built yet')
}
