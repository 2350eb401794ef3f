// Owns the client of the datagram protocol: plain UDP sockets, so that it runs anywhere.
// docs/client.md shows how to use it.

import { createSocket, type Socket } from 'node:dgram'
import { lookup } from 'node:dns/promises'
import { LatticeError } from '../errors.ts'
import { ClientExchange, type ClientPrompt } from './client-exchange.ts'
import {
  MAX_TOKENS_MAX,
  PROMPT_BYTES_MAX,
  PROTOCOL_PORT,
  TENANTS_MAX,
  type WireUsage,
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
  keyIndex?: 0 | 1
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
  /** A whole number; drawn unless given. */
  seed?: number
  /** Ends the answer with what there is, and reason 'abort'. */
  signal?: AbortSignal
}

export interface ReserveOptions extends Pick<GenerateOptions, 'model' | 'deadlineMs' | 'signal'> {
  /** The prompt will have no more. */
  promptBytes: number
  /** Nor the answer. */
  maxTokens: number
}

export interface TextDelta {
  text: string
  tokens: Uint32Array
}

export interface GenerateResult extends WireUsage {
  reason: 'stop' | 'length' | 'abort'
}

/** Engines that may die under one request before its caller hears of it. */
const LOST_MAX = 2

export class LatticeClient {
  readonly #options: ClientOptions
  readonly #key: SipKey
  /** Clients of one tenant choose alike only by a chance of 2^-64 a pair. */
  #nextRequest = crypto.getRandomValues(new BigUint64Array(1))[0] ?? 0n

  /** @throws LatticeError `invalid_request` for a tenant or key that cannot be one */
  constructor(options: ClientOptions) {
    const { tenant, key, keyIndex = 0 } = options
    const isTenant = Number.isInteger(tenant) && tenant >= 0 && tenant < TENANTS_MAX
    check(isTenant, 'tenant', `0 to ${TENANTS_MAX - 1}`)
    check(key.length === 16, 'key', '16 bytes')
    check(keyIndex === 0 || keyIndex === 1, 'keyIndex', '0 or 1')
    this.#options = options
    this.#key = sipKey(key)
  }

  /**
   * Generates text for one prompt.
   * @returns what came as it comes; the generator's value is how it ended
   * @throws LatticeError `invalid_request`, `server_unreachable`, or `request_rejected` with the
   *   server's code in `details.code`
   * @example
   * for await (const { text } of client.generate({ prompt: 'Hello', maxTokens: 20 })) write(text)
   */
  async *generate(options: GenerateOptions): AsyncGenerator<TextDelta, GenerateResult> {
    const { prompt, maxTokens } = options
    const bytes = promptBytes(options)
    const wanted = { ...options, bytes, isChat: typeof prompt !== 'string', maxTokens }
    for (let lost = 0; ; lost++) {
      const exchange = await this.#exchange({ ...options, promptBytes: bytes.length })
      const answer = exchange.run(wanted)
      let isTold = false
      try {
        for (;;) {
          const { done, value } = await answer.next()
          if (done) return value
          isTold = true
          yield value
        }
      } catch (thrown) {
        // Nobody has seen a word of it: another engine may as well answer.
        if (isTold || lost >= LOST_MAX || !isLost(thrown)) throw thrown
      } finally {
        exchange.close()
      }
    }
  }

  /**
   * Asks for room, once; the prompt may be known already or not yet.
   * @returns what takes the prompt, or is closed without
   * @throws LatticeError `server_unreachable`, or `request_rejected` with the server's code in
   *   `details.code` and when to try again in `details.retryAfterMs`
   */
  async reserve(options: ReserveOptions, prompt?: ClientPrompt): Promise<ClientExchange> {
    const exchange = await this.#exchange({ ...options, retries: 0 })
    try {
      await exchange.ask(prompt)
      return exchange
    } catch (thrown) {
      exchange.close()
      throw thrown
    }
  }

  async #exchange(options: ReserveOptions & { retries?: number }): Promise<ClientExchange> {
    const request = this.#nextRequest
    this.#nextRequest = BigInt.asUintN(64, request + 1n)
    const socket = await this.#connect()
    return new ClientExchange(socket, { ...options, ...this.#options, request }, this.#key)
  }

  async #connect(): Promise<Socket> {
    const { host, port = PROTOCOL_PORT } = this.#options
    let socket: Socket | undefined
    try {
      const { address, family } = await lookup(host)
      socket = createSocket(family === 6 ? 'udp6' : 'udp4')
      const { promise, resolve, reject } = Promise.withResolvers<void>()
      socket.once('error', reject)
      // Node gives what went wrong to the callback, though its types do not say so.
      const connected = (error?: Error): void => (error ? reject(error) : resolve())
      socket.connect(port, address, connected)
      await promise
      socket.off('error', reject)
      return socket
    } catch (cause) {
      socket?.close()
      const why = cause instanceof Error ? cause.message : String(cause)
      throw new LatticeError('server_unreachable', `No way to ${host}:${port}: ${why}.`, {
        todo: 'Check the host’s name and port.',
        cause,
      })
    }
  }
}

function isLost(thrown: unknown): boolean {
  return thrown instanceof LatticeError && thrown.details['code'] === 'replica_lost'
}

function promptBytes(options: GenerateOptions): Uint8Array {
  const { prompt, maxTokens, temperature = 0, topP = 1, seed = 0, deadlineMs = 0 } = options
  const bytes = Buffer.from(typeof prompt === 'string' ? prompt : JSON.stringify(prompt))
  const fits = bytes.length > 0 && bytes.length <= PROMPT_BYTES_MAX
  check(fits, 'prompt', `1 to ${PROMPT_BYTES_MAX} bytes long`)
  const isCount = Number.isInteger(maxTokens) && maxTokens >= 1 && maxTokens <= MAX_TOKENS_MAX
  check(isCount, 'maxTokens', `1 to ${MAX_TOKENS_MAX}`)
  check(temperature >= 0 && temperature <= 2, 'temperature', '0 to 2')
  check(topP > 0 && topP <= 1, 'topP', 'above 0 to 1')
  check(Number.isSafeInteger(seed) && seed >= 0, 'seed', 'a whole number from 0')
  check(Number.isInteger(deadlineMs) && deadlineMs >= 0 && deadlineMs < 2 ** 32, 'deadlineMs', 'ms')
  return bytes
}

function check(holds: boolean, name: string, what: string): void {
  if (holds) return
  throw new LatticeError('invalid_request', `'${name}' is not ${what}.`, {
    todo: `Give ${name} as ${what}.`,
    details: { param: name },
  })
}
