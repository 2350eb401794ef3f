// Owns a model's tokenizer and chat template.

import { LatticeError } from '../errors.ts'
import type { Model } from '../model/model.ts'
import type { ChatTemplate } from './chat-template.ts'
import type { Tokenizer } from './tokenizer.ts'

export function loadTokenizer(_model: Model): Tokenizer {
  throw new LatticeError('internal', 'not built yet')
}

export function loadChatTemplate(_model: Model): ChatTemplate | undefined {
  throw new LatticeError('internal', 'not built yet')
}
