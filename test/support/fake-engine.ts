// Owns an engine for tests: it answers with tokens that a script says, one a step, and counts.

import type {
  Engine,
  EngineAnswers,
  EngineQuestion,
  EngineSnapshot,
  FinishReason,
  SequenceChoice,
  SequenceHandle,
  SequenceRequest,
  SequenceSink,
  TokenLogprobs,
} from '../../src/engine/api.ts'
import { LatticeError } from '../../src/errors.ts'
import { EOS, fakeTokenizer } from './fake-tokenizer.ts'

export interface FakeEngineOptions {
  contextLength?: number
  maxRunning?: number
  maxQueue?: number
  /** Pause between steps; 0 steps once per turn of the event loop. */
  stepMs?: number
  /** The answer to a request, before its end-of-sequence token. Default: 'Hello!'. */
  reply?: (request: SequenceRequest) => string
  /** Tokens of each prompt that were in memory already. Default: 0. */
  cachedTokens?: number
  /** The mean log-probability of an answer's tokens. Default: that of probability 1/2. */
  score?: (request: SequenceRequest) => number
  /** Ends each sequence with this error after so many tokens. */
  failure?: { afterTokens: number; error: LatticeError }
}

interface Sequence {
  request: SequenceRequest
  sink: SequenceSink
  reply: Int32Array
  outputs: number
  aborted: boolean
  startMs: number
}

const PAGE_TOKENS = 16

export class FakeEngine implements Engine {
  readonly model
  /** Every call of a handle's abort, with when it came. */
  readonly aborts: { requestId: string; atMs: number }[] = []
  readonly requests: SequenceRequest[] = []
  /** How many sequences came together, by call. */
  readonly groups: number[] = []
  readonly #options: Required<Omit<FakeEngineOptions, 'failure'>> & FakeEngineOptions
  readonly #waiting: Sequence[] = []
  readonly #running: Sequence[] = []
  readonly #finished: Record<FinishReason, number> = { stop: 0, length: 0, abort: 0, error: 0 }
  #promptTokens = 0
  #outputTokens = 0
  #steps = 0
  #scheduled = false
  #draining = false
  #idle = Promise.withResolvers<void>()

  constructor(options: FakeEngineOptions = {}) {
    this.#options = {
      contextLength: 1024,
      maxRunning: 64,
      maxQueue: 512,
      stepMs: 0,
      reply: () => 'Hello!',
      cachedTokens: 0,
      score: () => -Math.LN2,
      ...options,
    }
    this.model = {
      id: 'fake/model',
      architecture: 'fake',
      contextLength: this.#options.contextLength,
      vocabSize: fakeTokenizer().vocabSize,
    }
  }

  submit(request: SequenceRequest, sink: SequenceSink): SequenceHandle {
    return this.submitChoices(request, [{ sampling: request.sampling, sink }])[0]!
  }

  submitChoices(request: SequenceRequest, choices: readonly SequenceChoice[]): SequenceHandle[] {
    if (this.#draining) throw new LatticeError('draining', 'The engine is draining.')
    if (this.queueRoom() < choices.length) {
      throw new LatticeError('queue_full', 'The queue is full.')
    }
    this.groups.push(choices.length)
    return choices.map(({ sampling, sink }) => this.#submit({ ...request, sampling }, sink))
  }

  #submit(request: SequenceRequest, sink: SequenceSink): SequenceHandle {
    const reply = fakeTokenizer().encode(this.#options.reply(request), {
      addSpecial: false,
      parseSpecial: false,
    })
    const startMs = performance.now()
    const sequence = { request, sink, reply, outputs: 0, aborted: false, startMs }
    this.requests.push(request)
    this.#waiting.push(sequence)
    this.#promptTokens += request.prompt.length
    this.#schedule()
    return {
      abort: () => {
        this.aborts.push({ requestId: request.requestId, atMs: performance.now() })
        sequence.aborted = true
      },
      fork: (choice) => this.submit({ ...request, sampling: choice.sampling }, choice.sink),
    }
  }

  queueRoom(): number {
    return Math.max(0, this.#options.maxQueue - this.#waiting.length)
  }

  async snapshot(): Promise<EngineSnapshot> {
    const usedPages = this.#running.reduce((sum, sequence) => sum + pages(sequence), 0)
    return {
      sequences: [...this.#waiting, ...this.#running].map((sequence, id) => ({
        id,
        requestId: sequence.request.requestId,
        tenant: sequence.request.tenant,
        state: this.#running.includes(sequence) ? 'decode' : 'waiting',
        promptTokens: sequence.request.prompt.length,
        kvTokens: sequence.request.prompt.length + sequence.outputs,
        outputTokens: sequence.outputs,
        pages: pages(sequence),
        bytes: pages(sequence) * 4096,
        ageMs: performance.now() - sequence.startMs,
      })),
      running: this.#running.length,
      waiting: this.#waiting.length,
      kv: {
        pageBytes: 4096,
        usedPages,
        limitPages: 1 << 20,
        residentBytes: usedPages * 4096,
        cachedPages: 0,
        pinnedPages: 0,
        prefixLimitPages: 0,
      },
      steps: this.#steps,
      promptTokens: this.#promptTokens,
      outputTokens: this.#outputTokens,
      finished: { ...this.#finished },
      preemptions: 0,
      beamCopies: 0,
      prefixQueries: 0,
      prefixHits: 0,
      prefixEvictions: 0,
      computeMs: this.#steps,
      stepMs: this.#steps * 2,
    }
  }

  async ask<Q extends EngineQuestion>(question: Q): Promise<EngineAnswers[Q['kind']]> {
    return (question.kind === 'unpin' ? false : []) as EngineAnswers[Q['kind']]
  }

  async drain(): Promise<void> {
    this.#draining = true
    if (this.#running.length + this.#waiting.length > 0) await this.#idle.promise
  }

  async close(): Promise<void> {
    for (const sequence of [...this.#waiting, ...this.#running]) sequence.aborted = true
    await this.drain()
  }

  #schedule(): void {
    if (this.#scheduled) return
    this.#scheduled = true
    if (this.#options.stepMs > 0) setTimeout(() => this.#step(), this.#options.stepMs)
    else setImmediate(() => this.#step())
  }

  #step(): void {
    this.#scheduled = false
    this.#steps++
    for (const sequence of this.#waiting.filter(({ aborted }) => aborted)) {
      this.#end(this.#waiting, sequence, 'abort')
    }
    while (this.#waiting.length > 0 && this.#running.length < this.#options.maxRunning) {
      const sequence = this.#waiting.shift()!
      sequence.sink.onStart?.(this.#options.cachedTokens)
      this.#running.push(sequence)
    }
    for (const sequence of this.#running.slice()) this.#advance(sequence)
    if (this.#running.length + this.#waiting.length > 0) this.#schedule()
    else {
      this.#idle.resolve()
      this.#idle = Promise.withResolvers()
    }
  }

  #advance(sequence: Sequence): void {
    const { request, reply, sink } = sequence
    const { failure } = this.#options
    if (sequence.aborted) return this.#end(this.#running, sequence, 'abort')
    if (failure && sequence.outputs >= failure.afterTokens) {
      return this.#end(this.#running, sequence, 'error', failure.error)
    }
    // Without an end-of-sequence token to stop at, the reply begins again.
    const length = reply.length + 1
    const token = reply[sequence.outputs % length] ?? EOS
    sequence.outputs++
    this.#outputTokens++
    if (request.stopTokens.includes(token)) return this.#end(this.#running, sequence, 'stop')
    sink.onToken(token, logprobs(token, request.topLogprobs))
    if (sequence.outputs >= request.maxTokens) this.#end(this.#running, sequence, 'length')
  }

  #end(from: Sequence[], sequence: Sequence, reason: FinishReason, error?: LatticeError): void {
    from.splice(from.indexOf(sequence), 1)
    this.#finished[reason]++
    const { request } = sequence
    const score = request.topLogprobs === undefined ? undefined : this.#options.score(request)
    sequence.sink.onFinish(reason, sequence.outputs, error, score)
  }
}

function pages(sequence: Sequence): number {
  return Math.ceil((sequence.request.prompt.length + sequence.outputs) / PAGE_TOKENS)
}

/** The chosen token has probability 1/2, the next byte values 1/4, 1/8 and so on. */
function logprobs(token: number, count: number | undefined): TokenLogprobs | undefined {
  if (count === undefined) return undefined
  const top = Array.from({ length: count }, (_, i) => ({
    token: (token + i) % 256,
    logprob: -(i + 1) * Math.LN2,
  }))
  return { logprob: -Math.LN2, top }
}
