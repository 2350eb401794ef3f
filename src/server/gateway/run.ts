// Owns one request that is forwarded over datagrams, as what an HTTP answer is made of.

import type { GenerationEvent } from '../../engine/generation.ts'
import { LatticeError } from '../../errors.ts'
import type { AbortCause } from '../../observe/server-metrics.ts'
import type { GenerateResult, TextDelta } from '../../net/client.ts'
import type { ClientExchange, ClientPrompt } from '../../net/client-exchange.ts'
import type { Answering } from '../openai/answer.ts'
import type { Usage } from '../openai/run.ts'

export class GatewayRun implements Answering {
  readonly requestId: string
  private ended = false
  private readonly exchange: ClientExchange
  private readonly prompt: ClientPrompt
  private result: GenerateResult | undefined
  private readonly gone: AbortController
  private answer: AsyncGenerator<TextDelta, GenerateResult> | undefined
  /** What has come before anybody looked. */
  private first: IteratorResult<TextDelta, GenerateResult> | undefined

  /** @param gone what the exchange listens to: aborted when nobody wants the answer any more */
  constructor(
    requestId: string,
    exchange: ClientExchange,
    prompt: ClientPrompt,
    gone: AbortController,
  ) {
    this.requestId = requestId
    this.exchange = exchange
    this.prompt = prompt
    this.gone = gone
  }

  get aborted(): boolean {
    return this.gone.signal.aborted
  }

  get usage(): Usage {
    const { promptTokens = 0, outputTokens = 0, cachedTokens = 0 } = this.result ?? {}
    return {
      prompt_tokens: promptTokens,
      completion_tokens: outputTokens,
      total_tokens: promptTokens + outputTokens,
      prompt_tokens_details: { cached_tokens: cachedTokens },
    }
  }

  abort(_cause: AbortCause): boolean {
    if (this.aborted || this.ended) return false
    this.gone.abort()
    return true
  }

  /**
   * Sends the prompt; resolves when an answer has begun, so that what is refused until then has a
   * status of its own and is no event of a stream.
   * @throws LatticeError why the server ended it; see `asHttp`
   */
  async begin(): Promise<void> {
    this.answer = this.exchange.run(this.prompt)
    try {
      this.first = await this.answer.next()
    } catch (thrown) {
      if (!this.aborted) throw asHttp(thrown)
    }
  }

  /** @throws LatticeError why the server ended it; see `asHttp` */
  async each(take: (event: GenerationEvent) => void): Promise<void> {
    const answer = this.answer ?? this.exchange.run(this.prompt)
    try {
      for (let step = this.first; ; step = undefined) {
        const { done, value } = step ?? (await answer.next())
        if (this.aborted) return
        if (done) return this.finish(value, take)
        // Without log-probabilities nobody asks which tokens they were.
        take({ kind: 'delta', choice: 0, text: value.text, tokens: [] })
      }
    } catch (thrown) {
      if (this.aborted) return
      throw asHttp(thrown)
    } finally {
      this.ended = true
      this.exchange.close()
    }
  }

  private finish(result: GenerateResult, take: (event: GenerationEvent) => void): void {
    const { reason, outputTokens } = result
    this.result = result
    if (reason === 'abort') {
      throw new LatticeError('engine_stopped', 'The server ended the answer early.')
    }
    const error = undefined
    take({ kind: 'finish', choice: 0, reason, matched: undefined, outputTokens, error })
  }
}

/** A refusal over datagrams as the error that our own server would answer with over HTTP. */
export function asHttp(thrown: unknown): unknown {
  if (!(thrown instanceof LatticeError) || thrown.code !== 'request_rejected') return thrown
  const { code, retryAfterMs = 0 } = thrown.details
  const options = { details: { code: code ?? null, retryAfterMs }, cause: thrown }
  switch (code) {
    case 'busy':
    case 'tenant_busy':
    case 'rate': {
      const todo = 'Try again after the seconds in Retry-After.'
      return new LatticeError('queue_full', thrown.message, { ...options, todo })
    }
    case 'context':
    case 'too_large': {
      const todo = 'Shorten the prompt, or ask for fewer tokens.'
      return new LatticeError('context_length_exceeded', thrown.message, { ...options, todo })
    }
    case 'model': {
      const todo = 'Ask for a model that the server has.'
      return new LatticeError('model_not_found', thrown.message, { ...options, todo })
    }
    case 'no_replica':
    case 'replica_lost':
    case 'failed':
      return new LatticeError('engine_stopped', thrown.message, options)
    default:
      return thrown
  }
}
