// Owns the list of architectures: from a model's family to the program that computes it.

import type { Architecture, Model } from '../model.ts'
import type { Program } from '../program.ts'
import { gemma3 } from './gemma3.ts'
import { llama } from './llama.ts'
import { qwen2 } from './qwen2.ts'
import { qwen3 } from './qwen3.ts'

const FAMILIES: Record<Architecture, (model: Pick<Model, 'config' | 'tensors'>) => Program> = {
  llama,
  qwen2,
  qwen3,
  gemma3,
}

/** The program of a model, by its architecture. */
export function programFor(model: Pick<Model, 'config' | 'tensors'>): Program {
  return FAMILIES[model.config.architecture](model)
}
