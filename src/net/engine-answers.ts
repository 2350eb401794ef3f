// Owns answering the datagram protocol's prompts with an engine: bytes become tokens, a generation
// its events, an error the protocol's code.

import type { Engine } from '../engine/api.ts'
import { GREEDY } from '../engine/api.ts'
import { generate, type GenerationEvent } from '../engine/generation.ts'
import { LatticeError, toLatticeError } from '../errors.ts'
import type { ChatTemplate } from '../text/chat-template.ts'
import type { Tokenizer } from '../text/tokenizer.ts'
import { requestName } from './decisions.ts'
import type { WireAnswer, WireRequest } from './exchange.ts'
import type { MessageCode, WireUsage } from './protocol.ts'
import { decode, endCode, errorCode, isWithinBounds, seedOf } from './wire-prompt.ts'

export interface AnswersOptions {
  engine: Engine
  tokenizer: Tokenizer
  /** Undefined if the model has none: chat is then refused. */
  template: ChatTemplate | undefined
  /** Says on the server's side what a code does not tell the client. */
  warn: (line: string) => void
  /** The engine has stopped: nothing more is to be asked of it. */
  onStopped?: () => void
  /** A prompt of a tenant's is in memory. */
  onComputed?: (wire: WireRequest, tokens: Int32Array, tenant: string) => void
}

export class EngineAnswers {
  private readonly options: AnswersOptions
  /** No token is longer in UTF-8: a prompt of more bytes than this fits no context. */
  private readonly promptBytesMax: number
  /** Generations that have not ended. */
  running = 0

  constructor(options: AnswersOptions) {
    this.options = options
    const { engine, tokenizer } = options
    let longest = 1
    for (let token = 0; token < tokenizer.vocabSize; token++) {
      longest = Math.max(longest, tokenizer.tokenBytes(token, false).length)
    }
    this.promptBytesMax = engine.model.contextLength * longest
  }

  /**
   * Starts a generation; returns what aborts it.
   * @param tenant as the engine knows it: its prefixes are its own
   */
  start(wire: WireRequest, tenant: string, answer: WireAnswer): () => void {
    const { engine, tokenizer } = this.options
    const usage: WireUsage = { promptTokens: 0, cachedTokens: 0, outputTokens: 0 }
    if (!isWithinBounds(wire)) {
      answer.end('malformed', usage)
      return () => {}
    }
    try {
      const prompt = this.encode(wire)
      usage.promptTokens = prompt.length
      const { temperature, topP, seed } = wire.sampling
      const generation = generate(engine, tokenizer, {
        requestId: requestName(wire.request),
        tenant,
        prompt,
        choices: 1,
        sampling: { ...GREEDY, temperature, topP, seed: seedOf(seed) },
        maxTokens: wire.maxTokens,
        stop: [],
        ignoreEos: false,
        topLogprobs: undefined,
        onStart: (cached) => (usage.cachedTokens = cached),
      })
      this.running++
      void this.answer(wire, generation.events, answer, usage, () => {
        this.options.onComputed?.(wire, prompt, tenant)
      })
      return () => generation.abort()
    } catch (thrown) {
      answer.end(this.codeOf(toLatticeError(thrown), wire), usage)
      return () => {}
    }
  }

  private async answer(
    wire: WireRequest,
    events: AsyncIterable<GenerationEvent>,
    answer: WireAnswer,
    usage: WireUsage,
    onComputed: () => void,
  ): Promise<void> {
    let isFirst = true
    for await (const event of events) {
      if (event.kind === 'delta') {
        const ids = event.tokens.map(({ token }) => token)
        answer.tokens(ids, event.text)
        if (isFirst) onComputed()
        isFirst = false
        continue
      }
      const { reason, outputTokens, error } = event
      this.running--
      const code = error ? this.codeOf(error, wire) : endCode(reason, undefined)
      answer.end(code, { ...usage, outputTokens })
    }
  }

  /** @throws LatticeError `context_length_exceeded`, `template_invalid`, `invalid_request` */
  private encode({ prompt, chat, raw, maxTokens }: WireRequest): Int32Array {
    const { engine, tokenizer, template } = this.options
    const { contextLength } = engine.model
    if (prompt.length > this.promptBytesMax) throw tooLong(prompt.length, contextLength)
    const text = decode(prompt)
    if (text === undefined) {
      throw new LatticeError('invalid_request', 'The prompt is no UTF-8.')
    }
    let tokens: Int32Array
    if (chat) {
      if (!template) throw new LatticeError('template_invalid', 'The model has no chat template.')
      const written = template.render(messagesOf(text), { addGenerationPrompt: true })
      tokens = tokenizer.encode(written, { addSpecial: false, parseSpecial: true })
    } else tokens = tokenizer.encode(text, { addSpecial: !raw, parseSpecial: false })
    if (tokens.length + maxTokens > contextLength) throw tooLong(prompt.length, contextLength)
    return tokens
  }

  private codeOf(error: LatticeError, { tenant, request }: WireRequest): MessageCode {
    const code = errorCode(error)
    if (error.code === 'engine_stopped') this.options.onStopped?.()
    if (code === 'failed') this.options.warn(failureLine(tenant, request, error.message))
    return code
  }
}

/** What the server's log has about a request that failed. */
export function failureLine(tenant: number, request: bigint, why: string): string {
  return `the datagram request ${requestName(request)} of tenant ${tenant} failed: ${why}`
}

function messagesOf(text: string): { role: string; content: string }[] {
  let messages: unknown
  try {
    messages = JSON.parse(text)
  } catch (cause) {
    throw new LatticeError('invalid_request', 'The messages are no JSON.', { cause })
  }
  const isMessage = (message: unknown): message is { role: string; content: string } => {
    const { role, content } = (message ?? {}) as Record<string, unknown>
    return typeof role === 'string' && typeof content === 'string'
  }
  if (Array.isArray(messages) && messages.length > 0 && messages.every(isMessage)) return messages
  throw new LatticeError('invalid_request', 'The messages are no list of role and content.')
}

function tooLong(bytes: number, contextLength: number): LatticeError {
  const what = `A prompt of ${bytes} bytes and its answer exceed ${contextLength} tokens.`
  return new LatticeError('context_length_exceeded', what)
}
