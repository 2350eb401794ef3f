// Owns the client of the datagram protocol: plain UDP sockets, so that it runs anywhere. It asks,
// sends the prompt when that was granted, and hands out text as it comes, whatever the network
// loses on the way.

import { createSocket, type Socket } from 'node:dgram'
import { lookup } from 'node:dns/promises'
import { LatticeError } from '../errors.ts'
import { NumberedReceiver, NumberedSender } from './numbered.ts'
import {
  FRAGMENT_BYTES,
  fragmentsOf,
  HEADER_BYTES,
  type Header,
  hashOf,
  MESSAGE_CODES,
  MESSAGE_FLAGS,
  MESSAGE_TYPES,
  type MessageCode,
  type MessageType,
  modelHash,
  prefixHashes,
  PROMPT_BYTES_MAX,
  PROTOCOL_PORT,
  readHeader,
  readTokens,
  writeHeader,
  writeSampling,
} from './protocol.ts'
import { type SipKey, sipKey } from './siphash.ts'

export interface ClientOptions {
  host: string
  port?: number
  /** What the server's administrator gave out. */
  tenant: number
  /** 16 bytes. */
  key: Uint8Array
  /** Which of the tenant's two keys that is; 0 unless told. */
  keyIndex?: number
}

export interface GenerateOptions {
  /** Text; or messages of a chat, to which the server applies its template. */
  prompt: string | readonly { role: string; content: string }[]
  maxTokens: number
  /** The server's default unless given. */
  model?: string
  /** Gives up so long after the start. */
  deadlineMs?: number
  /** 0, the default, is greedy. */
  temperature?: number
  /** 1, the default, is off. */
  topP?: number
  seed?: number
  signal?: AbortSignal
}

export interface TextDelta {
  text: string
  tokens: Uint32Array
}

export interface GenerateResult {
  reason: 'stop' | 'length' | 'abort'
  outputTokens: number
  /** Of the prompt, found in the server's memory. */
  cachedTokens: number
}

/** Server busy: asked again so often, after what it says or at least a while that doubles. */
const RETRIES = 5
const RETRY_MS = 50
/** A HELLO or its answer was lost. */
const HELLO_MS = 100
const HELLO_REPEATS = 6

export class LatticeClient {
  readonly #options: ClientOptions
  readonly #key: SipKey
  #nextRequest = BigInt(Date.now()) << 20n

  constructor(options: ClientOptions) {
    this.#options = options
    this.#key = sipKey(options.key)
    const random = crypto.getRandomValues(new Uint32Array(1))[0] ?? 0
    // Clients of one tenant that start in the same millisecond must not choose the same numbers.
    this.#nextRequest += BigInt(random & 0xfff00)
  }

  /**
   * Generates text for one prompt.
   * @returns what came as it comes; the generator's value is how it ended
   * @throws LatticeError `server_unreachable`, or `request_rejected` with the server's code
   * @example
   * for await (const { text } of client.generate({ prompt: 'Hello', maxTokens: 20 })) write(text)
   */
  async *generate(options: GenerateOptions): AsyncGenerator<TextDelta, GenerateResult> {
    const { host, port = PROTOCOL_PORT } = this.#options
    const { address, family } = await lookup(host)
    const socket = createSocket(family === 6 ? 'udp6' : 'udp4')
    const exchange = new Exchange(socket, this.#options, this.#key, this.#nextRequest++, options)
    try {
      await new Promise<void>((resolve, reject) => {
        socket.once('error', reject)
        socket.connect(port, address, resolve)
      })
      await exchange.ask()
      return yield* exchange.run()
    } finally {
      exchange.close()
    }
  }
}

/** One request from HELLO to END. */
class Exchange {
  readonly #socket: Socket
  readonly #key: SipKey
  readonly #base: Partial<Header>
  readonly #prompt: Uint8Array
  readonly #options: GenerateOptions
  readonly #sampling: [bigint, bigint]
  readonly #sender = new NumberedSender()
  readonly #receiver = new NumberedReceiver()
  /** Arrived, but not yet in order; by number. */
  readonly #early = new Map<number, { header: Header; delta: TextDelta | undefined }>()
  readonly #deltas: TextDelta[] = []
  #answer: Header | undefined
  #granted: Header | undefined
  #end: Header | undefined
  #next = 0
  #wake: () => void = () => {}
  #failure: Error | undefined

  constructor(
    socket: Socket,
    { tenant, keyIndex = 0 }: ClientOptions,
    key: SipKey,
    request: bigint,
    options: GenerateOptions,
  ) {
    const { prompt, maxTokens, model, deadlineMs } = options
    const chat = typeof prompt !== 'string'
    this.#prompt = Buffer.from(chat ? JSON.stringify(prompt) : prompt)
    if (this.#prompt.length === 0 || this.#prompt.length > PROMPT_BYTES_MAX) {
      throw new LatticeError('invalid_request', `The prompt has ${this.#prompt.length} bytes.`, {
        todo: `Send 1 to ${PROMPT_BYTES_MAX} bytes.`,
      })
    }
    this.#socket = socket
    this.#key = key
    this.#options = options
    const { temperature = 0, topP = 1, seed = Date.now() } = options
    this.#sampling = writeSampling({ temperature, topP, seed: BigInt(seed) })
    this.#base = {
      tenant,
      key: keyIndex,
      request,
      flags: chat ? MESSAGE_FLAGS.chat : 0,
      model: model === undefined ? 0 : modelHash(model),
      promptBytes: this.#prompt.length,
      maxTokens,
      deadlineMs: deadlineMs ?? 0,
      fragments: fragmentsOf(this.#prompt.length),
    }
    socket.on('message', (message) => this.#receive(message))
    socket.on('error', (error) => {
      this.#failure = error
      this.#wake()
    })
    options.signal?.addEventListener('abort', () => this.#wake(), { once: true })
  }

  /** Says HELLO until it is granted. */
  async ask(): Promise<void> {
    const words = prefixHashes(this.#key, this.#prompt)
    for (let retry = 0; ; retry++) {
      this.#answer = undefined
      for (let i = 0; i < HELLO_REPEATS && !this.#answer; i++) {
        const flags = (this.#base.flags ?? 0) | (i > 0 ? MESSAGE_FLAGS.retry : 0)
        this.#send(MESSAGE_TYPES.hello, { words, flags })
        await this.#until(() => this.#answer !== undefined, HELLO_MS << i)
      }
      const answer = this.#answer as Header | undefined
      if (!answer) {
        throw new LatticeError('server_unreachable', 'The server does not answer.', {
          todo: 'Check host, port, tenant and key: a HELLO with a wrong key gets no answer.',
        })
      }
      if (answer.type === MESSAGE_TYPES.grant) {
        this.#granted = answer
        return
      }
      await this.#retryOrThrow(answer, retry)
    }
  }

  /** Sends the prompt, and yields what comes back. */
  async *run(): AsyncGenerator<TextDelta, GenerateResult> {
    this.#sender.extend(this.#base.fragments ?? 0)
    let cancelled = false
    while (!this.#end) {
      if (this.#options.signal?.aborted && !cancelled) {
        this.#send(MESSAGE_TYPES.cancel, { words: [this.#cookie, 0n, 0n, 0n] })
        cancelled = true
      }
      this.#pump()
      if (this.#sender.failed) {
        throw new LatticeError('server_unreachable', 'The server has stopped answering.')
      }
      yield* this.#deltas.splice(0)
      if (this.#end) break
      const times = [this.#sender.nextMs(), this.#receiver.ackMs].filter((at) => at !== undefined)
      const waitMs = Math.max(0, Math.min(...times, performance.now() + 1000) - performance.now())
      await this.#until(() => this.#deltas.length > 0 || this.#end !== undefined, waitMs)
    }
    this.#acknowledge()
    yield* this.#deltas.splice(0)
    return resultOf(this.#end)
  }

  close(): void {
    // Whoever stops listening early does not want the rest computed either.
    if (this.#granted && !this.#end && !this.#failure) {
      this.#send(MESSAGE_TYPES.cancel, { words: [this.#cookie, 0n, 0n, 0n] })
    }
    // After what was sent has left.
    setImmediate(() => this.#socket.close())
  }

  get #cookie(): bigint {
    return this.#granted?.words[0] ?? 0n
  }

  #pump(): void {
    const now = performance.now()
    for (const fragment of this.#sender.due(now)) {
      const from = fragment * FRAGMENT_BYTES
      const payload = this.#prompt.subarray(from, from + FRAGMENT_BYTES)
      const words: Header['words'] = [this.#cookie, hashOf(this.#key, payload), ...this.#sampling]
      this.#send(MESSAGE_TYPES.data, { fragment, words }, payload)
    }
    const { ackMs } = this.#receiver
    if (ackMs !== undefined && ackMs <= now) this.#acknowledge()
  }

  #acknowledge(): void {
    const { firstMissing, bitmap } = this.#receiver
    this.#send(MESSAGE_TYPES.ack, { words: [this.#cookie, BigInt(firstMissing), bitmap, 64n] })
    this.#receiver.said()
  }

  #send(type: MessageType, change: Partial<Header>, payload: Uint8Array = new Uint8Array()): void {
    const datagram = new Uint8Array(HEADER_BYTES + payload.length)
    const header: Partial<Header> = {
      ...this.#base,
      type,
      route: this.#granted?.route ?? 0,
      timeUs: BigInt(Date.now()) * 1000n,
      payloadBytes: payload.length,
      ...change,
    }
    datagram.set(payload, HEADER_BYTES)
    writeHeader(new DataView(datagram.buffer), header, this.#key)
    this.#socket.send(datagram)
  }

  #receive(message: Buffer): void {
    const view = new DataView(message.buffer, message.byteOffset, message.byteLength)
    const header = readHeader(view, this.#key)
    if (!header || header.request !== this.#base.request) return
    const { type, words } = header
    if (type === MESSAGE_TYPES.grant || type === MESSAGE_TYPES.reject) this.#answer = header
    else if (words[0] !== this.#cookie) return
    else if (type === MESSAGE_TYPES.ack) {
      const [, firstMissing, bitmap, window] = words
      const now = performance.now()
      this.#sender.acknowledge(Number(firstMissing), bitmap, Number(window), now)
      this.#pump()
    } else if (type === MESSAGE_TYPES.tokens || type === MESSAGE_TYPES.end) {
      this.#receiveNumbered(header, message.subarray(HEADER_BYTES))
    }
    this.#wake()
  }

  #receiveNumbered(header: Header, payload: Uint8Array): void {
    const isEnd = header.type === MESSAGE_TYPES.end
    if (!isEnd && hashOf(this.#key, payload) !== header.words[1]) return
    const number = Number(isEnd ? header.words[1] : header.words[2])
    if (!this.#receiver.take(number, performance.now())) return
    const delta = isEnd ? undefined : readTokens(payload)
    this.#early.set(number, { header, delta })
    for (let next = this.#early.get(this.#next); next; next = this.#early.get(this.#next)) {
      this.#early.delete(this.#next++)
      if (next.delta) this.#deltas.push(next.delta)
      else this.#end = next.header
    }
  }

  async #retryOrThrow(answer: Header, retry: number): Promise<void> {
    const code = codeName(answer.code)
    const busy = code === 'busy' || code === 'tenant_busy' || code === 'no_replica'
    const waitMs = Math.max(answer.deadlineMs, RETRY_MS << retry)
    const { deadlineMs = 30_000 } = this.#options
    if ((busy || code === 'rate') && retry < RETRIES && waitMs <= deadlineMs) {
      await this.#until(() => false, waitMs)
      return
    }
    throw new LatticeError('request_rejected', `The server refused the request: ${code}.`, {
      todo: waitMs > RETRY_MS << retry ? `Try again in ${waitMs} ms.` : 'See docs/protocol.md.',
      details: { code, retryAfterMs: answer.deadlineMs },
    })
  }

  /** Waits until something has come that makes this true, or so long. */
  async #until(enough: () => boolean, waitMs: number): Promise<void> {
    const end = performance.now() + waitMs
    while (!enough() && !this.#options.signal?.aborted) {
      if (this.#failure) {
        throw new LatticeError('server_unreachable', `The network failed: ${this.#failure.message}`)
      }
      const left = end - performance.now()
      if (left <= 0) return
      const { promise, resolve } = Promise.withResolvers<void>()
      this.#wake = resolve
      const timer = setTimeout(resolve, left)
      await promise
      clearTimeout(timer)
    }
  }
}

function codeName(code: number): MessageCode | `code ${number}` {
  const found = Object.entries(MESSAGE_CODES).find(([, value]) => value === code)
  return found ? (found[0] as MessageCode) : `code ${code}`
}

function resultOf({ code, words }: Header): GenerateResult {
  const name = codeName(code)
  if (name === 'ok' || name === 'length' || name === 'cancelled') {
    const reason = name === 'ok' ? 'stop' : name === 'length' ? 'length' : 'abort'
    return { reason, outputTokens: Number(words[2]), cachedTokens: Number(words[3]) }
  }
  throw new LatticeError('request_rejected', `The server ended the request: ${name}.`, {
    todo: 'See docs/protocol.md.',
    details: { code: name },
  })
}
