// Owns the HTTP server.

import type { Engine } from '../engine/api.ts'
import { LatticeError } from '../errors.ts'
import type { ChatTemplate } from '../text/chat-template.ts'
import type { Tokenizer } from '../text/tokenizer.ts'

export interface ServerOptions {
  engine: Engine
  tokenizer: Tokenizer
  template: ChatTemplate | undefined
  host: string
  port: number
  apiKeys: readonly string[]
}

export interface Server {
  url: string
  drain(): Promise<void>
  close(): Promise<void>
}

export function startServer(_options: ServerOptions): Promise<Server> {
  throw new LatticeError('internal', 'not built yet')
}
