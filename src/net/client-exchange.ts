// Owns one request of a client from HELLO to END: it asks, sends the prompt when that was granted,
// and hands out text as it comes, whatever the network loses on the way. What is due to be sent is
// sent by a timer, so that a reader who takes his time is not taken for one who has gone.

import type { Socket } from 'node:dgram'
import { randomInt } from 'node:crypto'
import { LatticeError } from '../errors.ts'
import type { ClientOptions, GenerateOptions, GenerateResult, TextDelta } from './client.ts'
import { NumberedReceiver, NumberedSender } from './numbered.ts'
import {
  FRAGMENT_BYTES,
  fragmentsOf,
  type Header,
  HEADER_BYTES,
  hashOf,
  MESSAGE_CODES,
  MESSAGE_FLAGS,
  MESSAGE_TYPES,
  type MessageCode,
  type MessageType,
  modelHash,
  prefixHashes,
  readHeader,
  readTokens,
  readUsage,
  writeHeader,
  writeSampling,
} from './protocol.ts'
import type { SipKey } from './siphash.ts'

export type ClientRequest = Omit<GenerateOptions, 'prompt'> &
  ClientOptions & {
    /** The prompt has no more bytes than this. */
    promptBytes: number
    request: bigint
    /** How often a busy server is asked again. */
    retries?: number
  }

/** What may be known only once it was granted. */
export interface ClientPrompt extends Pick<GenerateOptions, 'temperature' | 'topP' | 'seed'> {
  /** UTF-8, of at least one byte and no more than was asked for. */
  bytes: Uint8Array
  isChat: boolean
  /** No more than was asked for. */
  maxTokens: number
}

/** Server busy: asked again so often, after what it says or at least a while that doubles. */
const RETRIES = 5
const RETRY_MS = 50
/** Asked again later than this is for the caller to decide. */
const RETRY_MS_MAX = 30_000
/** A HELLO or its answer was lost. */
const HELLO_MS = 100
const HELLO_REPEATS = 6
/** A server that has said nothing for so long is asked whether it is there, and so again. */
const PROBE_MS = 2_000
/** One that has not answered then is not. */
const SILENCE_MS = 12_000
/** A CANCEL that has no answer is sent again; nobody waits longer than this for its END. */
const CANCEL_MS = 100
const CANCEL_MS_MAX = 1_000
/** The server ends a request at its deadline; its END is waited for so long. */
const LATE_MS = 1_000

const EMPTY = new Uint8Array()
const CUT_OFF: GenerateResult = {
  reason: 'abort',
  promptTokens: 0,
  cachedTokens: 0,
  outputTokens: 0,
}

export class ClientExchange {
  readonly #socket: Socket
  readonly #key: SipKey
  readonly #request: ClientRequest
  #base: Partial<Header>
  #prompt: ClientPrompt | undefined
  #sampling: [bigint, bigint] = [0n, 0n]
  readonly #sender = new NumberedSender()
  readonly #receiver = new NumberedReceiver()
  /** Arrived, but not yet in order; by number. */
  readonly #early = new Map<number, { header: Header; delta: TextDelta | undefined }>()
  readonly #deltas: TextDelta[] = []
  readonly #dueMs: number
  #answer: Header | undefined
  #granted: Header | undefined
  #end: Header | undefined
  #next = 0
  #heardMs = performance.now()
  #probedMs = -Infinity
  #cancelledMs: number | undefined
  #cancelSentMs = -Infinity
  #failure: Error | undefined
  #wake: () => void = () => {}
  #timer: NodeJS.Timeout | undefined
  readonly #onAbort = (): void => {
    if (this.#granted) this.#tick()
    this.#wake()
  }

  /** @param socket connected to the server; it is this exchange's from now on */
  constructor(socket: Socket, request: ClientRequest, key: SipKey) {
    const { promptBytes, tenant, keyIndex = 0, maxTokens, model, deadlineMs = 0 } = request
    this.#socket = socket
    this.#key = key
    this.#request = request
    this.#dueMs = deadlineMs === 0 ? Infinity : performance.now() + deadlineMs
    this.#base = {
      tenant,
      key: keyIndex,
      request: request.request,
      model: model === undefined ? 0 : modelHash(model),
      promptBytes,
      maxTokens,
      fragments: fragmentsOf(promptBytes),
    }
    socket.on('message', (message) => this.#receive(message))
    socket.on('error', (error) => this.#fail(networkFailed(error)))
    request.signal?.addEventListener('abort', this.#onAbort)
  }

  /**
   * Asks, sends the prompt, and yields what comes back.
   * @param prompt what the answer is to; it may have been asked for before
   */
  async *run(prompt: ClientPrompt): AsyncGenerator<TextDelta, GenerateResult> {
    if (this.#granted) this.#setPrompt(prompt)
    else if (!(await this.ask(prompt))) return CUT_OFF
    this.#sender.extend(this.#base.fragments ?? 0)
    this.#tick()
    for (;;) {
      yield* this.#deltas.splice(0)
      if (this.#end) break
      if (this.#failure) throw this.#failure
      if (this.#isCutOff()) return CUT_OFF
      const isNews = () => this.#deltas.length > 0 || this.#end !== undefined || this.#isCutOff()
      await this.#until(isNews, PROBE_MS)
    }
    yield* this.#deltas.splice(0)
    return resultOf(this.#end)
  }

  /** Which replica was granted, counted from 1; 0 before. */
  get route(): number {
    return this.#granted?.route ?? 0
  }

  #setPrompt(prompt: ClientPrompt): void {
    const { bytes, isChat, maxTokens, temperature = 0, topP = 1 } = prompt
    const { seed = randomInt(2 ** 47) } = prompt
    this.#prompt = prompt
    this.#sampling = writeSampling({ temperature, topP, seed: BigInt(seed) })
    this.#base = {
      ...this.#base,
      flags: isChat ? MESSAGE_FLAGS.chat : 0,
      promptBytes: bytes.length,
      maxTokens,
      fragments: fragmentsOf(bytes.length),
    }
  }

  close(): void {
    clearTimeout(this.#timer)
    this.#request.signal?.removeEventListener('abort', this.#onAbort)
    // Whoever stops listening early does not want the rest computed either; after a failure, which
    // may be of one direction, the server may still hear it.
    if (this.#granted && !this.#end) this.#sendCancel()
    // After what was sent has left.
    setImmediate(() => this.#socket.close())
  }

  /**
   * Says HELLO until it is granted; before the prompt is known, for as much as it may be. False if
   * the caller gave up meanwhile.
   * @throws LatticeError `server_unreachable`, `request_rejected`
   */
  async ask(prompt?: ClientPrompt): Promise<boolean> {
    if (prompt) this.#setPrompt(prompt)
    // Only key 0 makes prefix hashes that the server compares.
    const { keyIndex = 0 } = this.#request
    const words: Header['words'] =
      keyIndex === 0 && this.#prompt
        ? prefixHashes(this.#key, this.#prompt.bytes)
        : [0n, 0n, 0n, 0n]
    for (let retry = 0; ; retry++) {
      this.#answer = undefined
      for (let i = 0; i < HELLO_REPEATS && !this.#answer; i++) {
        if (this.#request.signal?.aborted) return false
        const flags = (this.#base.flags ?? 0) | (i > 0 ? MESSAGE_FLAGS.retry : 0)
        this.#send(MESSAGE_TYPES.hello, { words, flags })
        await this.#until(() => this.#answer !== undefined, HELLO_MS << i)
      }
      const answer = this.#answer as Header | undefined
      if (!answer) throw unanswered()
      if (answer.type === MESSAGE_TYPES.grant) {
        this.#granted = answer
        return true
      }
      await this.#until(() => false, this.#retryMs(answer, retry))
    }
  }

  /**
   * How long to wait before asking again.
   * @throws LatticeError `request_rejected` if asking again makes no sense
   */
  #retryMs(answer: Header, retry: number): number {
    const code = codeName(answer.code)
    const waitMs = Math.max(answer.deadlineMs, RETRY_MS << retry)
    const passes = ['busy', 'tenant_busy', 'no_replica', 'rate'].includes(code)
    const inTime = waitMs <= RETRY_MS_MAX && performance.now() + waitMs < this.#dueMs
    const { retries = RETRIES } = this.#request
    if (passes && retry < retries && inTime) return waitMs
    throw new LatticeError('request_rejected', `The server refused the request: ${code}.`, {
      todo: passes ? `Try again in ${waitMs} ms or later.` : todoOf(code),
      details: { code, retryAfterMs: answer.deadlineMs },
    })
  }

  /** Sends what is due, and comes back when more will be. */
  #tick(): void {
    clearTimeout(this.#timer)
    if (this.#end || this.#failure) return
    const now = performance.now()
    if (this.#request.signal?.aborted) this.#cancel(now)
    else this.#sendPrompt(now)
    const { ackMs } = this.#receiver
    if (ackMs !== undefined && ackMs <= now) this.#acknowledge()
    this.#probe(now)
    if (this.#sender.failed || now - this.#heardMs > SILENCE_MS) {
      this.#fail(this.#isUndelivered() ? undelivered() : silent())
    }
    if (now > this.#dueMs + LATE_MS) this.#fail(tooLate())
    const times = [
      this.#cancelledMs === undefined ? this.#sender.nextMs() : this.#cancelSentMs + CANCEL_MS,
      this.#receiver.ackMs,
      this.#heardMs + PROBE_MS,
      this.#dueMs + LATE_MS + 1,
    ].filter((at) => at !== undefined)
    const waitMs = Math.min(...times) - performance.now()
    this.#timer = setTimeout(() => this.#tick(), Math.min(PROBE_MS, Math.max(1, waitMs)))
  }

  /** The server granted it, but the first of several fragments, a whole one, never came. */
  #isUndelivered(): boolean {
    const { total, firstMissing } = this.#sender
    return this.#granted !== undefined && total > 1 && firstMissing === 0
  }

  #sendPrompt(now: number): void {
    for (const fragment of this.#sender.due(now)) {
      const from = fragment * FRAGMENT_BYTES
      const payload = (this.#prompt?.bytes ?? EMPTY).subarray(from, from + FRAGMENT_BYTES)
      const words: Header['words'] = [this.#cookie, hashOf(this.#key, payload), ...this.#sampling]
      this.#send(MESSAGE_TYPES.data, { fragment, words }, payload)
    }
  }

  #cancel(now: number): void {
    this.#cancelledMs ??= now
    if (now - this.#cancelSentMs >= CANCEL_MS) {
      this.#cancelSentMs = now
      this.#sendCancel()
    }
    if (this.#isCutOff()) this.#wake()
  }

  /** The caller gave up, and no END came for so long that nobody waits for it. */
  #isCutOff(): boolean {
    return performance.now() - (this.#cancelledMs ?? Infinity) > CANCEL_MS_MAX
  }

  #probe(now: number): void {
    if (now - Math.max(this.#heardMs, this.#probedMs) < PROBE_MS) return
    this.#probedMs = now
    this.#acknowledge(MESSAGE_FLAGS.retry)
  }

  get #cookie(): bigint {
    return this.#granted?.words[0] ?? 0n
  }

  #sendCancel(): void {
    this.#send(MESSAGE_TYPES.cancel, { words: [this.#cookie, 0n, 0n, 0n] })
  }

  #acknowledge(flag = 0): void {
    const { firstMissing, bitmap, ahead } = this.#receiver
    const words: Header['words'] = [this.#cookie, BigInt(firstMissing), bitmap, BigInt(ahead)]
    this.#send(MESSAGE_TYPES.ack, { words, flags: (this.#base.flags ?? 0) | flag })
    this.#receiver.said()
  }

  #send(type: MessageType, change: Partial<Header>, payload: Uint8Array = EMPTY): void {
    const datagram = new Uint8Array(HEADER_BYTES + payload.length)
    const leftMs = Math.ceil(this.#dueMs - performance.now())
    const header: Partial<Header> = {
      ...this.#base,
      type,
      route: this.#granted?.route ?? 0,
      timeUs: BigInt(Date.now()) * 1000n,
      deadlineMs: leftMs === Infinity ? 0 : Math.max(1, leftMs),
      payloadBytes: payload.length,
      ...change,
    }
    datagram.set(payload, HEADER_BYTES)
    writeHeader(new DataView(datagram.buffer), header, this.#key)
    // What the network refuses now is repeated like what it loses; errors come by their event.
    this.#socket.send(datagram, () => {})
  }

  #receive(message: Buffer): void {
    const view = new DataView(message.buffer, message.byteOffset, message.byteLength)
    const header = readHeader(view, this.#key)
    if (!header || header.request !== this.#base.request) return
    const { type, words } = header
    if (type === MESSAGE_TYPES.grant || type === MESSAGE_TYPES.reject) this.#answer = header
    else if (!this.#granted || words[0] !== this.#cookie) return
    else if (type === MESSAGE_TYPES.ack) {
      const [, firstMissing, bitmap, window] = words
      const now = performance.now()
      this.#sender.acknowledge(Number(firstMissing), bitmap, Number(window), now)
    } else if (type === MESSAGE_TYPES.tokens || type === MESSAGE_TYPES.end) {
      this.#receiveNumbered(header, message.subarray(HEADER_BYTES))
    }
    this.#heardMs = performance.now()
    if (this.#granted) this.#tick()
    this.#wake()
  }

  #receiveNumbered(header: Header, payload: Uint8Array): void {
    const isEnd = header.type === MESSAGE_TYPES.end
    if (!isEnd && hashOf(this.#key, payload) !== header.words[1]) return
    const delta = isEnd ? undefined : readTokens(payload)
    if (!isEnd && !delta) return
    const number = Number(isEnd ? header.words[1] : header.words[2])
    if (!this.#receiver.take(number, performance.now())) return
    this.#early.set(number, { header, delta })
    for (let next = this.#early.get(this.#next); next; next = this.#early.get(this.#next)) {
      this.#early.delete(this.#next++)
      if (next.delta) this.#deltas.push(next.delta)
      else this.#end = next.header
    }
    if (this.#end) this.#acknowledge()
  }

  #fail(error: Error): void {
    if (!this.#end) this.#failure ??= error
    this.#wake()
  }

  /** Waits until something has come that makes this true, the caller gives up, or so long. */
  async #until(enough: () => boolean, waitMs: number): Promise<void> {
    const end = performance.now() + waitMs
    const gaveUp = this.#request.signal?.aborted ?? false
    while (!enough()) {
      if (this.#failure) throw this.#failure
      const left = end - performance.now()
      if (left <= 0 || (this.#request.signal?.aborted ?? false) !== gaveUp) return
      const { promise, resolve } = Promise.withResolvers<void>()
      this.#wake = resolve
      const timer = setTimeout(resolve, left)
      await promise
      clearTimeout(timer)
    }
  }
}

/** What to do about a refusal that does not pass by itself. */
const TODOS: Partial<Record<MessageCode, string>> = {
  timed_out: 'Give it more time, or ask for less.',
  failed: 'The server’s log has the reason.',
  replica_lost: 'Ask again: another engine answers.',
  version: 'Client and server speak different versions: update the older one.',
  clock: 'The clocks of client and server are over 30 s apart: set them.',
  model: 'Ask for a model that the server has, or name none.',
  request_reused: 'Ask again.',
  context: 'Shorten the prompt, or ask for fewer tokens.',
  prompt: 'Send UTF-8, or messages of a chat to a model that has a chat template.',
  too_large: 'Shorten the prompt, or ask for fewer tokens: the tenant may never take so many.',
}

function todoOf(code: MessageCode | `code ${number}`): string {
  return TODOS[code as MessageCode] ?? 'The codes are in docs/protocol.md.'
}

function codeName(code: number): MessageCode | `code ${number}` {
  const found = Object.entries(MESSAGE_CODES).find(([, value]) => value === code)
  return found ? (found[0] as MessageCode) : `code ${code}`
}

function resultOf(end: Header): GenerateResult {
  const name = codeName(end.code)
  if (name === 'ok' || name === 'length' || name === 'cancelled') {
    const reason = name === 'ok' ? 'stop' : name === 'length' ? 'length' : 'abort'
    return { reason, ...readUsage(end.words) }
  }
  throw new LatticeError('request_rejected', `The server ended the request: ${name}.`, {
    todo: todoOf(name),
    details: { code: name },
  })
}

function unanswered(): LatticeError {
  return new LatticeError('server_unreachable', 'The server does not answer.', {
    todo:
      'Check host, port, tenant and key: a wrong one gets no answer. Over a veth pair this end ' +
      'needs an XDP program too (docs/net.md).',
  })
}

function undelivered(): LatticeError {
  const what = 'The server granted the request, but the prompt does not arrive.'
  return new LatticeError('server_unreachable', what, {
    todo: 'Try again; if small prompts do arrive, a link’s MTU is below 1324 bytes (IPv6: 1344).',
  })
}

function silent(): LatticeError {
  return new LatticeError('server_unreachable', 'The server has stopped answering.', {
    todo: 'Try again, or another server.',
  })
}

function tooLate(): LatticeError {
  return new LatticeError('request_rejected', 'The deadline has passed.', {
    todo: 'Give it more time, or ask for less.',
    details: { code: 'timed_out' },
  })
}

function networkFailed(cause: NodeJS.ErrnoException): LatticeError {
  if (cause.code === 'ECONNREFUSED') {
    const what = 'Nothing takes datagrams at that port of the server.'
    return new LatticeError('server_unreachable', what, {
      todo: 'Attach a server there (lattice net attach, lattice serve --net); check host and port.',
    })
  }
  return new LatticeError('server_unreachable', `The network failed: ${cause.message}.`, { cause })
}
