// Owns a request's text: it joins an engine's tokens with the tokenizer and the stop strings, and
// hands out text deltas. The engine knows tokens only; servers and the CLI know text only.

import { LatticeError, toLatticeError } from '../errors.ts'
import { MAX_CHOICES } from '../limits.ts'
import type { Detokenizer, Tokenizer } from '../text/tokenizer.ts'
import type {
  BeamParams,
  ClientConnection,
  Engine,
  FinishReason,
  SamplingParams,
  SequenceHandle,
  SequenceSink,
  TokenLogprobs,
} from './api.ts'
import { StopMatcher } from './stop.ts'

export interface GenerationRequest {
  requestId: string
  tenant: string
  prompt: Int32Array
  /** Independent samples, of which i samples with seed + i; or the best of a beam search. */
  choices: number
  beams?: BeamParams
  /** Without a seed the caller draws one: here it is always set. */
  sampling: SamplingParams
  maxTokens: number
  /** Ends a choice; never part of its text, not even partly. */
  stop: readonly string[]
  /** Keep generating after end-of-sequence tokens. */
  ignoreEos: boolean
  topLogprobs: number | undefined
  connection?: ClientConnection
  /** Called once for each choice that leaves the engine's queue. Must not throw. */
  onStart?: (cachedTokens: number) => void
}

export interface DeltaToken {
  token: number
  logprobs: TokenLogprobs | undefined
}

export type GenerationEvent =
  /** Text that is final: it cannot become part of a stop string. May be '' when only tokens are. */
  | { kind: 'delta'; choice: number; text: string; tokens: readonly DeltaToken[] }
  | {
      kind: 'finish'
      choice: number
      reason: 'stop' | 'length' | 'abort' | 'error'
      /** The stop string that matched, if one did. */
      matched: string | undefined
      outputTokens: number
      error: LatticeError | undefined
      /** As `SequenceSink.onFinish` has it. */
      score?: number
    }

export interface Generation {
  /** Ends after every choice's finish. Leaving the loop early aborts what still runs. */
  readonly events: AsyncIterable<GenerationEvent>
  /** Output tokens of samples that were not told, once all events are. */
  readonly discardedTokens: number
  abort(): void
}

/**
 * Starts `choices` sequences.
 *
 * Tokens that arrive before the consumer asks are joined to one delta a choice. A token is in a
 * delta as soon as it is known, its text when that is final; tokens behind a matched stop string
 * are not reported, those that completed it are. `events` is for one consumer.
 *
 * @throws LatticeError as `Engine.submit` does, and `invalid_request` for stop strings or a number
 *   of choices out of bounds; then no sequence of the request runs.
 */
export function generate(
  engine: Engine,
  tokenizer: Tokenizer,
  request: GenerationRequest,
): Generation {
  checkChoices(request)
  const news = new News(request.choices)
  const { requestId, tenant, prompt, sampling, maxTokens, topLogprobs } = request
  const stopTokens = request.ignoreEos ? [] : tokenizer.eosTokens
  const choices = Array.from(
    { length: request.choices },
    (_, i) => new Choice(i, tokenizer, request, news),
  )
  const handles = engine.submitChoices(
    {
      ...{ requestId, tenant, prompt, sampling, maxTokens, stopTokens, topLogprobs },
      ...(request.beams ? { beams: request.beams } : {}),
      ...(request.connection ? { connection: request.connection } : {}),
    },
    // The first one's very own object: a message to the engine's thread then carries it once.
    choices.map((sink, i) => ({
      sink,
      sampling: i === 0 ? sampling : { ...sampling, seed: sampling.seed + i },
    })),
  )
  handles.forEach((handle, i) => choices[i]?.submitted(handle))
  return {
    events: {
      [Symbol.asyncIterator]: () => ({
        next: () => news.next(),
        return: async () => {
          for (const choice of choices) choice.abandon()
          news.close()
          return { done: true, value: undefined }
        },
      }),
    },
    discardedTokens: 0,
    abort: () => {
      for (const choice of choices) choice.abort()
    },
  }
}

function checkChoices({ choices, sampling, beams, stop }: GenerationRequest): void {
  if (!Number.isInteger(choices) || choices < 1 || choices > MAX_CHOICES) {
    throw new LatticeError('invalid_request', `n is ${choices}; it must be 1 to ${MAX_CHOICES}.`, {
      todo: `Ask for 1 to ${MAX_CHOICES} choices.`,
      details: { param: 'n' },
    })
  }
  // Beams end by their tokens; where their text would end, others would be the best.
  if (beams && stop.length > 0) {
    throw new LatticeError('unsupported_parameter', 'A beam search has no stop strings.', {
      todo: 'Leave out either.',
      details: { param: 'stop' },
    })
  }
  // Beyond 2^53 − 1, seed + i would be rounded and choices share a seed.
  if (!Number.isSafeInteger(sampling.seed + (choices - 1))) {
    throw new LatticeError('invalid_request', `The seed ${sampling.seed} is too large.`, {
      todo: 'Use a seed within ±2^52.',
      details: { param: 'seed' },
    })
  }
}

/** One sequence: takes its tokens, keeps what has not been told yet. */
class Choice implements SequenceSink {
  readonly #index: number
  readonly #news: News
  readonly #detokenizer: Detokenizer
  readonly #stop: StopMatcher
  readonly #onStart: ((cachedTokens: number) => void) | undefined
  #handle: SequenceHandle | undefined
  /** Nothing the engine still says about this sequence counts. */
  #ended = false
  #abortWanted = false
  #received = 0
  /** Sum of the log-probabilities of received tokens. */
  #logprobs = 0
  #text = ''
  #tokens: DeltaToken[] = []
  #finish: (GenerationEvent & { kind: 'finish' }) | undefined
  /** In the news' queue; theirs to set. */
  queued = false

  constructor(index: number, tokenizer: Tokenizer, request: GenerationRequest, news: News) {
    this.#index = index
    this.#news = news
    this.#detokenizer = tokenizer.detokenizer({ skipSpecial: true })
    this.#stop = new StopMatcher(request.stop)
    this.#onStart = request.onStart
  }

  submitted(handle: SequenceHandle): void {
    this.#handle = handle
    // A sink may be called before the engine returns.
    if (this.#abortWanted) handle.abort()
  }

  /** Asks the engine to end; it answers with `onFinish`. */
  abort(): void {
    if (this.#ended) return
    this.#abortEngine()
  }

  /** Ends without another event: nobody listens. */
  abandon(): void {
    if (this.#ended) return
    this.#ended = true
    this.#abortEngine()
  }

  onStart(cachedTokens: number): void {
    if (!this.#ended) this.#onStart?.(cachedTokens)
  }

  onToken(token: number, logprobs: TokenLogprobs | undefined): void {
    if (this.#ended) return
    this.#received += 1
    this.#logprobs += logprobs?.logprob ?? NaN
    this.#tokens.push({ token, logprobs })
    try {
      this.#text += this.#stop.push(this.#detokenizer.push(token))
    } catch (error) {
      this.#end('error', this.#received, toLatticeError(error))
      this.#abortEngine()
      return
    }
    if (this.#stop.matched !== undefined) {
      const mean = this.#logprobs / this.#received
      this.#end('stop', this.#received, undefined, Number.isNaN(mean) ? undefined : mean)
      this.#abortEngine()
      return
    }
    this.#news.of(this)
  }

  onFinish(
    reason: FinishReason,
    outputTokens: number,
    error: LatticeError | undefined,
    score?: number,
  ): void {
    if (this.#ended) return
    try {
      this.#text += this.#stop.push(this.#detokenizer.end())
    } catch (thrown) {
      this.#end('error', outputTokens, toLatticeError(thrown))
      return
    }
    if (this.#stop.matched !== undefined) {
      this.#end('stop', outputTokens, undefined, score)
      return
    }
    this.#text += this.#stop.end()
    this.#end(reason, outputTokens, error, score)
  }

  /** What is to be told next, in order: text and tokens, then the finish. */
  take(): GenerationEvent | undefined {
    if (this.#text !== '' || this.#tokens.length > 0) {
      const delta = { choice: this.#index, text: this.#text, tokens: this.#tokens }
      this.#text = ''
      this.#tokens = []
      return { kind: 'delta', ...delta }
    }
    const finish = this.#finish
    this.#finish = undefined
    return finish
  }

  /** A finish waits to be told. */
  get finished(): boolean {
    return this.#finish !== undefined
  }

  #end(
    reason: FinishReason,
    outputTokens: number,
    error: LatticeError | undefined,
    score?: number,
  ): void {
    this.#ended = true
    const told = { reason, matched: this.#stop.matched, outputTokens, error }
    this.#finish = { kind: 'finish', choice: this.#index, ...told }
    if (score !== undefined) this.#finish.score = score
    this.#news.of(this)
  }

  #abortEngine(): void {
    this.#abortWanted = true
    this.#handle?.abort()
  }
}

/** Hands a request's events to its one consumer: choices that have something to tell, in turn. */
class News {
  #open: number
  readonly #queue: Choice[] = []
  #wake: (() => void) | undefined
  #turn: Promise<unknown> = Promise.resolve()

  constructor(choices: number) {
    this.#open = choices
  }

  /** Notes that a choice has something to tell. */
  of(choice: Choice): void {
    if (!choice.queued) {
      choice.queued = true
      this.#queue.push(choice)
    }
    this.#wake?.()
  }

  /** Nobody will ask again; who still waits is told the end. */
  close(): void {
    this.#open = 0
    this.#queue.length = 0
    this.#wake?.()
  }

  /** The next event; calls that overlap are answered in order. */
  next(): Promise<IteratorResult<GenerationEvent>> {
    const answer = this.#turn.then(() => this.#next())
    this.#turn = answer
    return answer
  }

  async #next(): Promise<IteratorResult<GenerationEvent>> {
    while (this.#open > 0) {
      const event = this.#take()
      if (event !== undefined) return { done: false, value: event }
      await new Promise<void>((resolve) => {
        this.#wake = resolve
      })
      this.#wake = undefined
    }
    return { done: true, value: undefined }
  }

  #take(): GenerationEvent | undefined {
    const choice = this.#queue.shift()
    if (choice === undefined) return undefined
    const event = choice.take()
    choice.queued = false
    // Its finish, if it has one, comes after the others had their turn.
    if (choice.finished) this.of(choice)
    if (event?.kind === 'finish') this.#open -= 1
    return event
  }
}
