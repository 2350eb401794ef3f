// Owns one request's generations from submit to last event: numbering, timing, usage, abortion.

import {
  generate,
  type Generation,
  type GenerationEvent,
  type GenerationRequest,
} from '../../engine/generation.ts'
import type { ClientConnection } from '../../engine/api.ts'
import { generateBest } from '../../engine/best-of.ts'
import { LatticeError } from '../../errors.ts'
import { GenerationTimer } from '../../observe/generation-timer.ts'
import type { AbortCause } from '../../observe/server-metrics.ts'
import { connectionOf, type RouteContext, type ServerContext } from '../context.ts'

export interface Usage {
  prompt_tokens: number
  completion_tokens: number
  total_tokens: number
  prompt_tokens_details: { cached_tokens: number }
}

/** What is the same for each prompt of a request; the prompt itself and its room differ. */
export type RunRequest = Omit<
  GenerationRequest,
  'requestId' | 'tenant' | 'prompt' | 'maxTokens' | 'onStart'
> & {
  /** Samples of which `choices` are told. */
  bestOf: number
}

export interface RunPrompt {
  tokens: Int32Array
  maxTokens: number
}

/** A request's generations: prompt p's choice c is choice p × choices + c of the answer. */
export class Run {
  readonly requestId: string
  readonly choices: number
  #generations: Generation[] = []
  readonly #context: ServerContext
  readonly #arrivalMs: number
  readonly #request: RunRequest
  readonly #connection: ClientConnection | undefined
  #promptTokens = 0
  #cachedTokens = 0
  #outputTokens = 0
  #aborted = false
  #ended = false

  /**
   * Submits every prompt; the client's going away aborts them.
   * @throws LatticeError as `Engine.submit` does; then nothing of the request runs.
   */
  constructor(
    context: ServerContext,
    c: RouteContext,
    request: RunRequest,
    prompts: readonly RunPrompt[],
  ) {
    this.requestId = c.get('requestId')
    this.choices = prompts.length * request.choices
    this.#context = context
    this.#request = request
    this.#arrivalMs = c.get('arrivalMs')
    this.#connection = connectionOf(context, c)
    try {
      for (const prompt of prompts) this.#submit(prompt, c.get('tenant'))
    } catch (error) {
      this.#stop()
      throw error
    }
    context.metrics.requestChoices.observe(request.choices)
    const { signal } = c.req.raw
    if (signal.aborted) this.abort('disconnect')
    else signal.addEventListener('abort', () => this.abort('disconnect'), { once: true })
  }

  get aborted(): boolean {
    return this.#aborted
  }

  get usage(): Usage {
    return {
      prompt_tokens: this.#promptTokens,
      completion_tokens: this.#outputTokens,
      total_tokens: this.#promptTokens + this.#outputTokens,
      prompt_tokens_details: { cached_tokens: this.#cachedTokens },
    }
  }

  /** Ends every choice; false if the run had ended or been aborted already. */
  abort(cause: AbortCause): boolean {
    if (this.#aborted || this.#ended) return false
    this.#context.metrics.requestAborts.add(1, [cause])
    this.#stop()
    return true
  }

  /**
   * Hands on each event until the last choice has finished. After an abort nothing is handed on.
   * @throws LatticeError what ended a choice; the others are aborted
   */
  async each(take: (event: GenerationEvent) => void): Promise<void> {
    const { choices } = this.#request
    try {
      await Promise.all(
        this.#generations.map((generation, i) => this.#consume(generation, i * choices, take)),
      )
    } catch (error) {
      this.abort('error')
      throw error
    }
    this.#ended = true
  }

  #submit(prompt: RunPrompt, tenant: string): void {
    const { metrics, engine, tokenizer } = this.#context
    const submittedMs = performance.now()
    let started = false
    const { bestOf, ...request } = this.#request
    const sampled = {
      ...request,
      requestId: this.requestId,
      tenant,
      prompt: prompt.tokens,
      maxTokens: prompt.maxTokens,
      ...(this.#connection && { connection: this.#connection }),
      onStart: (cachedTokens: number) => {
        // Choices share their prompt; it counts once.
        if (!started) this.#cachedTokens += cachedTokens
        started = true
        metrics.requestQueueTime.observe((performance.now() - submittedMs) / 1000)
      },
    }
    const pick = bestOf > request.choices && !request.beams
    const generation = pick
      ? generateBest(engine, tokenizer, sampled, bestOf)
      : generate(engine, tokenizer, sampled)
    this.#generations.push(generation)
    this.#promptTokens += prompt.tokens.length
    metrics.requestPromptTokens.observe(prompt.tokens.length)
    metrics.requestMaxTokens.observe(prompt.maxTokens)
  }

  async #consume(
    generation: Generation,
    firstChoice: number,
    take: (event: GenerationEvent) => void,
  ): Promise<void> {
    const timer = new GenerationTimer(this.#context.metrics, this.#arrivalMs, this.#request.choices)
    for await (const event of generation.events) {
      timer.see(event)
      if (event.kind === 'finish') {
        this.#outputTokens += event.outputTokens
        // The engine knew of it before we did.
        if (event.reason === 'abort' && this.#connection) this.abort('disconnect')
      }
      if (this.#aborted) continue
      if (event.kind === 'finish') checkFinish(event)
      take(firstChoice === 0 ? event : { ...event, choice: firstChoice + event.choice })
    }
    this.#outputTokens += generation.discardedTokens
  }

  #stop(): void {
    this.#aborted = true
    for (const generation of this.#generations) generation.abort()
  }
}

/** An answer that neither the model nor the client ended is none. */
function checkFinish(event: GenerationEvent & { kind: 'finish' }): void {
  if (event.error) throw event.error
  if (event.reason === 'stop' || event.reason === 'length') return
  throw new LatticeError('engine_stopped', 'The engine ended the answer before it was complete.', {
    todo: 'Send the request again.',
  })
}
