// Owns the engine as the main thread sees it: requests go to the engine thread, tokens come back
// to their sinks. Whatever happens to that thread, every sequence gets its finish.

import { Worker } from 'node:worker_threads'
import { present } from '../assert.ts'
import { LatticeError, toLatticeError } from '../errors.ts'
import { pagesFor, tokensIn } from '../kv/layout.ts'
import { PagerHost } from '../tier/pager-host.ts'
import type {
  DirectSink,
  DirectWay,
  Engine,
  EngineAnswers,
  EngineModel,
  EngineQuestion,
  EngineSnapshot,
  SequenceChoice,
  SequenceHandle,
  SequenceRequest,
  SequenceSink,
} from './api.ts'
import { COUNTS, handoverMemory } from './handover.ts'
import {
  type EngineFacts,
  type EngineThreadOptions,
  type FromEngine,
  sequenceEnded,
  type ToEngine,
} from './messages.ts'

export interface ClientLimits {
  /** Sequences that run and wait together, at most. */
  sequences: number
  contextLength: number
}

/** An engine in the middle of a step that has not answered after this long is not waited for. */
const SNAPSHOT_WAIT_MS = 250

/** A step that takes longer counts as hung: what was before it is no answer any more. */
const STEP_MS_MAX = 60_000

interface LiveSequence {
  sink: SequenceSink
  /** Told to the sink; what it gets as its count if the thread dies without a word. */
  outputTokens: number
}

export class EngineClient implements Engine {
  readonly model: EngineModel
  readonly facts: EngineFacts
  private readonly worker: Worker
  private readonly pager: PagerHost | undefined
  private readonly signal: Int32Array
  private readonly limits: ClientLimits
  private readonly live = new Map<number, LiveSequence>()
  private readonly snapshots = new Map<number, PromiseWithResolvers<EngineSnapshot>>()
  private readonly questions = new Map<number, PromiseWithResolvers<never>>()
  private latest: { snapshot: EngineSnapshot; atMs: number } | undefined
  private readonly drained: (() => void)[] = []
  /** Shared with whoever queues prompts past this thread. */
  private readonly counts = new Int32Array(new SharedArrayBuffer(4 * COUNTS.words))
  private directSink: DirectSink | undefined
  private nextTicket = 1
  private draining = false
  private stopped: LatticeError | undefined

  private constructor(
    worker: Worker,
    pager: PagerHost | undefined,
    signal: Int32Array,
    model: EngineModel,
    facts: EngineFacts,
    limits: ClientLimits,
  ) {
    this.worker = worker
    this.pager = pager
    this.signal = signal
    this.model = model
    this.facts = facts
    this.limits = limits
    this.counts[COUNTS.nextId] = 1
    worker.on('message', (message: FromEngine) => this.receive(message))
    worker.on('error', (thrown) => this.stop(toLatticeError(thrown)))
    worker.on('exit', () => {
      this.stop(stopped())
      void this.pager?.terminate()
    })
    if (!pager) return
    pager.onDeath = (why) => this.stop(why)
    if (pager.death) this.stop(pager.death)
  }

  /**
   * Starts the engine thread and waits until its model is loaded.
   * @param onStarting hears of what takes long, before it begins
   * @throws LatticeError what kept the thread from it
   */
  static async start(
    options: Omit<EngineThreadOptions, 'signal'>,
    model: EngineModel,
    limits: ClientLimits,
    onStarting: (what: string) => void = () => {},
  ): Promise<EngineClient> {
    const signal = new SharedArrayBuffer(4)
    const workerData: EngineThreadOptions = { ...options, signal }
    const worker = new Worker(new URL('./thread.ts', import.meta.url), { workerData })
    let pager: PagerHost | undefined
    const facts = await new Promise<EngineFacts>((resolve, reject) => {
      worker.on('message', (message: FromEngine) => {
        if (message.kind === 'ready') resolve(message.facts)
        else if (message.kind === 'starting') onStarting(message.what)
        else if (message.kind === 'pager') pager = new PagerHost(message.start)
        else if (message.kind === 'failed') reject(LatticeError.fromJSON(message.error))
      })
      worker.once('error', (thrown) => reject(toLatticeError(thrown)))
      worker.once('exit', () => reject(stopped()))
    }).catch((thrown: unknown) => {
      void pager?.terminate()
      throw thrown
    })
    // Each by name: the worker keeps internal listeners that deliver its messages.
    for (const event of ['message', 'error', 'exit']) worker.removeAllListeners(event)
    return new EngineClient(worker, pager, new Int32Array(signal), model, facts, limits)
  }

  submit(request: SequenceRequest, sink: SequenceSink): SequenceHandle {
    return present(this.submitChoices(request, [{ sampling: request.sampling, sink }])[0], 'one')
  }

  submitChoices(request: SequenceRequest, choices: readonly SequenceChoice[]): SequenceHandle[] {
    this.check(request)
    this.checkRoom(choices.length)
    const ids = choices.map(() => this.newId())
    const samplings = choices.map(({ sampling }) => sampling)
    this.send({ kind: 'submit', ids, request, samplings })
    choices.forEach(({ sink }, i) => this.begin(present(ids[i], 'an id'), sink))
    return ids.map((id) => this.handle(id))
  }

  private handle(id: number): SequenceHandle {
    return {
      abort: () => {
        if (this.live.has(id)) this.send({ kind: 'abort', id })
      },
      fork: (choice) => this.fork(id, choice),
    }
  }

  private fork(parent: number, { sampling, sink }: SequenceChoice): SequenceHandle {
    this.checkRoom(1)
    if (!this.live.has(parent)) throw sequenceEnded()
    const id = this.newId()
    this.send({ kind: 'fork', parent, id, sampling })
    this.begin(id, sink)
    return this.handle(id)
  }

  private newId(): number {
    return Atomics.add(this.counts, COUNTS.nextId, 1)
  }

  private begin(id: number, sink: SequenceSink): void {
    this.live.set(id, { sink, outputTokens: 0 })
    Atomics.add(this.counts, COUNTS.live, 1)
  }

  direct(sink: DirectSink, stopTokens: readonly number[]): DirectWay {
    const { kvPages, layout } = this.facts
    const { sequences, contextLength } = this.limits
    const place = {
      memory: handoverMemory(),
      counts: this.counts.buffer as SharedArrayBuffer,
      signal: this.signal.buffer as SharedArrayBuffer,
      sequences,
      tokensMax: Math.min(contextLength, tokensIn(layout, kvPages)),
      stopTokens,
    }
    this.directSink = sink
    this.send({ kind: 'direct', place })
    return {
      place,
      running: () => this.running - this.live.size,
      abort: (id) => this.send({ kind: 'abort', id }),
      close: () => {
        if (this.directSink !== sink) return
        this.directSink = undefined
        this.send({ kind: 'direct', place: undefined })
      },
    }
  }

  /** Sequences that run or wait, whoever queued them. */
  private get running(): number {
    return Atomics.load(this.counts, COUNTS.live)
  }

  queueRoom(): number {
    return Math.max(0, this.limits.sequences - this.running)
  }

  snapshot(): Promise<EngineSnapshot> {
    if (this.stopped) return Promise.reject(stopped(this.stopped))
    const ticket = this.nextTicket++
    const answer = Promise.withResolvers<EngineSnapshot>()
    this.snapshots.set(ticket, answer)
    this.send({ kind: 'snapshot', ticket })
    const timer = setTimeout(() => {
      const { latest } = this
      if (latest && performance.now() - latest.atMs < STEP_MS_MAX) answer.resolve(latest.snapshot)
    }, SNAPSHOT_WAIT_MS)
    return answer.promise.finally(() => clearTimeout(timer))
  }

  ask<Q extends EngineQuestion>(question: Q): Promise<EngineAnswers[Q['kind']]> {
    if (this.stopped) return Promise.reject(stopped(this.stopped))
    const ticket = this.nextTicket++
    const answer = Promise.withResolvers<never>()
    this.questions.set(ticket, answer)
    this.send({ kind: 'ask', ticket, question })
    return answer.promise
  }

  async drain(): Promise<void> {
    this.refuse()
    if (this.running === 0) return
    await new Promise<void>((resolve) => this.drained.push(resolve))
  }

  async close(): Promise<void> {
    if (this.stopped) return
    this.refuse()
    const exited = new Promise<void>((resolve) => this.worker.once('exit', () => resolve()))
    this.send({ kind: 'close' })
    await exited
  }

  private refuse(): void {
    this.draining = true
    Atomics.store(this.counts, COUNTS.closed, 1)
  }

  /** Whether so many more sequences may be queued now. */
  private checkRoom(sequences: number): void {
    if (this.stopped) throw stopped(this.stopped)
    if (this.draining) {
      // What was counted on the other thread for a moment, and is refused here now.
      this.tellDrained()
      throw new LatticeError('draining', 'The server is shutting down.', { todo: 'Retry later.' })
    }
    if (this.queueRoom() >= sequences) return
    throw new LatticeError('queue_full', `${this.running} sequences run or wait already.`, {
      todo: 'Retry later, or start with a larger --max-queue.',
    })
  }

  private check({ prompt, maxTokens }: SequenceRequest): void {
    const { contextLength } = this.limits
    this.checkTokens(prompt)
    if (!Number.isInteger(maxTokens) || maxTokens < 1) {
      throw new LatticeError('invalid_request', `max_tokens is ${maxTokens}.`, {
        todo: 'Ask for at least one token.',
        details: { param: 'max_tokens' },
      })
    }
    if (prompt.length + maxTokens > contextLength) {
      throw new LatticeError(
        'context_length_exceeded',
        `The prompt has ${prompt.length} tokens and ${maxTokens} more are asked for;` +
          ` the context holds ${contextLength}.`,
        { todo: 'Shorten the prompt, ask for fewer tokens, or start with a larger --context.' },
      )
    }
    const { kvPages, layout } = this.facts
    const pages = pagesFor(layout, prompt.length + maxTokens)
    if (pages > kvPages) {
      const { pageBytes } = layout.shape
      throw new LatticeError(
        'kv_memory_exhausted',
        `The request may need ${pages * pageBytes} bytes of KV memory;` +
          ` the limit is ${kvPages * pageBytes}.`,
        { todo: 'Ask for fewer tokens or start with a larger --kv-memory.' },
      )
    }
  }

  /** A token that is not in the vocabulary would be read from beyond the embedding. */
  private checkTokens(prompt: Int32Array): void {
    const { vocabSize } = this.model
    // As unsigned numbers, negative ones are too large; findIndex takes ten times as long.
    let right = 0
    while (right < prompt.length && prompt[right]! >>> 0 < vocabSize) right++
    if (prompt.length > 0 && right === prompt.length) return
    const wrong = prompt.length > 0 ? right : -1
    throw new LatticeError(
      'invalid_request',
      wrong < 0
        ? 'The prompt has no tokens.'
        : `Token ${wrong} of the prompt is ${prompt[wrong]}; the vocabulary has ${vocabSize}.`,
      { todo: `Send at least one token id, each from 0 to ${vocabSize - 1}.` },
    )
  }

  private send(message: ToEngine): void {
    this.worker.postMessage(message)
    Atomics.add(this.signal, 0, 1)
    Atomics.notify(this.signal, 0)
  }

  private receive(message: FromEngine): void {
    if (message.kind === 'tokens') this.deliver(message)
    else if (message.kind === 'started') {
      const { id, cachedTokens } = message
      const sequence = this.live.get(id)
      if (sequence) sequence.sink.onStart?.(cachedTokens)
      else this.directSink?.onStart(id, cachedTokens)
    } else if (message.kind === 'snapshot') {
      this.latest = { snapshot: message.snapshot, atMs: performance.now() }
      this.snapshots.get(message.ticket)?.resolve(message.snapshot)
      this.snapshots.delete(message.ticket)
    } else if (message.kind === 'answer') {
      this.questions.get(message.ticket)?.resolve(message.answer as never)
      this.questions.delete(message.ticket)
    } else if (message.kind === 'failed') this.stop(LatticeError.fromJSON(message.error))
  }

  private deliver({ tokens, logprobs, finished }: Extract<FromEngine, { kind: 'tokens' }>): void {
    for (let i = 0; i < tokens.length; i += 2) {
      const id = tokens[i] ?? 0
      const sequence = this.live.get(id)
      if (!sequence) {
        this.directSink?.onToken(id, tokens[i + 1] ?? 0)
        continue
      }
      sequence.outputTokens++
      sequence.sink.onToken(tokens[i + 1] ?? 0, logprobs?.get(i / 2))
    }
    for (const { id, reason, outputTokens, error, score } of finished) {
      const sequence = this.live.get(id)
      this.live.delete(id)
      Atomics.sub(this.counts, COUNTS.live, 1)
      const why = error && LatticeError.fromJSON(error)
      if (sequence) sequence.sink.onFinish(reason, outputTokens, why, score)
      else this.directSink?.onFinish(id, reason, outputTokens, why)
    }
    this.tellDrained()
  }

  private tellDrained(): void {
    if (this.running === 0) for (const resolve of this.drained.splice(0)) resolve()
  }

  /** Nothing more comes from the thread: everyone who waits for it is told why. */
  private stop(why: LatticeError): void {
    if (this.stopped) return
    this.stopped = why
    Atomics.store(this.counts, COUNTS.closed, 1)
    for (const asked of [this.snapshots, this.questions]) {
      for (const answer of asked.values()) answer.reject(stopped(why))
      asked.clear()
    }
    for (const { sink, outputTokens } of this.live.values()) {
      sink.onFinish('error', outputTokens, why)
    }
    this.live.clear()
    Atomics.store(this.counts, COUNTS.live, 0)
    this.directSink?.onStopped(stopped(why))
    for (const resolve of this.drained.splice(0)) resolve()
  }
}

function stopped(why?: LatticeError): LatticeError {
  if (why?.code === 'engine_stopped') return why
  const what = why ? `The engine has stopped: ${why.message}` : 'The engine has stopped.'
  return new LatticeError('engine_stopped', what, { todo: 'Start it again.', cause: why })
}
