// Owns one replica's end of the datagram protocol: prompts are put together from DATA, handed to
// the engine, and what it says goes back as numbered TOKENS and an END. The ingress program has let
// every datagram in by its MAC and cookie; what is in it is checked here. No I/O, no clock: frames
// come in by `take`, go out by `send`, and time by arguments.

import { type FrameLayout, layoutOf, ReturnPath } from './frame.ts'
import { NumberedReceiver, NumberedSender } from './numbered.ts'
import {
  FRAGMENT_BYTES,
  type Header,
  HEADER_BYTES,
  hashOf,
  MESSAGE_CODES,
  MESSAGE_FLAGS,
  MESSAGE_TYPES,
  type MessageCode,
  type MessageType,
  readHeader,
  readSampling,
  type WireSampling,
  writeHeader,
  writeTokens,
} from './protocol.ts'
import type { SipKey } from './siphash.ts'

/** A prompt that is complete. */
export interface WireRequest {
  tenant: number
  request: bigint
  /** UTF-8; JSON messages if `chat`. */
  prompt: Uint8Array
  chat: boolean
  /** No special tokens are added to text. */
  raw: boolean
  maxTokens: number
  sampling: WireSampling
}

/** Where an answer goes. */
export interface WireAnswer {
  /** Sent with what comes within the batching deadline. */
  tokens(ids: readonly number[], text: string): void
  end(code: MessageCode, outputTokens: number, cachedTokens: number): void
}

export interface ReplicaEvents {
  /** Starts a request; returns what aborts it. */
  start(request: WireRequest, answer: WireAnswer): () => void
  /** It is over: with how many tokens it may be charged. */
  finished(tenant: number, request: bigint, usedTokens: number): void
  /** Sends a frame that `write` fills and measures. */
  send(write: (frame: Uint8Array) => number): void
}

/** A datagram's text and ids, at most: with the header it fits what DATA fits. */
const PAYLOAD_MAX = FRAGMENT_BYTES
/** Tokens wait so long for others of their flow: half of what a fast decode step takes. */
export const BATCH_MS = 4
/** A prompt that takes longer between two fragments has lost its sender. */
const ARRIVAL_MS = 10_000
/** An ended request still answers late repeats for so long. */
const LINGER_MS = 4_000

export class Replica {
  private readonly exchanges = new Map<string, Exchange>()
  private readonly keys: (tenant: number, index: number) => SipKey | undefined
  private readonly events: ReplicaEvents

  constructor(keys: (tenant: number, index: number) => SipKey | undefined, events: ReplicaEvents) {
    this.keys = keys
    this.events = events
  }

  get running(): number {
    return this.exchanges.size
  }

  /** A frame that the ingress program redirected here. */
  take(view: DataView, at: number, bytes: number, nowMs: number): void {
    const layout = layoutOf(view, at, bytes)
    if (!layout) return
    const data = new DataView(view.buffer, view.byteOffset + layout.data, layout.dataBytes)
    const key = this.keys(data.getUint32(8), data.getUint16(12))
    const header = key && readHeader(data, key)
    if (!header) return
    const id = `${header.tenant}:${header.request}`
    let exchange = this.exchanges.get(id)
    if (!exchange) {
      // What comes late after the end, or an answer to nothing.
      if (header.type !== MESSAGE_TYPES.data) return
      exchange = new Exchange(header, key, new ReturnPath(view, at, layout), this.events, nowMs)
      this.exchanges.set(id, exchange)
    }
    exchange.take(header, payloadOf(view, layout), nowMs)
  }

  /**
   * Sends what is due.
   * @returns when there is more to do if nothing arrives; undefined if there is nothing
   */
  turn(nowMs: number): number | undefined {
    let next: number | undefined
    for (const [id, exchange] of this.exchanges) {
      const at = exchange.turn(nowMs)
      if (at === undefined) this.exchanges.delete(id)
      else if (next === undefined || at < next) next = at
    }
    return next
  }
}

function payloadOf(view: DataView, { data, dataBytes }: FrameLayout): Uint8Array {
  return new Uint8Array(
    view.buffer,
    view.byteOffset + data + HEADER_BYTES,
    dataBytes - HEADER_BYTES,
  )
}

/** One request, from its first DATA to the last repeat of its END. */
class Exchange implements WireAnswer {
  private readonly base: Partial<Header>
  private readonly header: Header
  private readonly key: SipKey
  private readonly path: ReturnPath
  private readonly events: ReplicaEvents
  private prompt: Uint8Array | undefined
  private readonly receiver: NumberedReceiver
  private readonly sender = new NumberedSender()
  /** Numbered datagrams to send; those that have arrived are let go. */
  private readonly outgoing: { type: MessageType; words: Header['words']; payload: Uint8Array }[] =
    []
  private let = 0
  private abort: (() => void) | undefined
  private pendingIds: number[] = []
  private pendingText = ''
  private pendingMs = Infinity
  private tokensSent = 0
  private heardMs: number
  private endedMs = Infinity

  constructor(header: Header, key: SipKey, path: ReturnPath, events: ReplicaEvents, nowMs: number) {
    const { tenant, key: index, request, route, model } = header
    this.base = { tenant, key: index, request, route, model }
    this.header = header
    this.key = key
    this.path = path
    this.events = events
    this.heardMs = nowMs
    this.prompt = new Uint8Array(header.promptBytes)
    this.receiver = new NumberedReceiver(64)
  }

  take(header: Header, payload: Uint8Array, nowMs: number): void {
    this.heardMs = nowMs
    if (header.type === MESSAGE_TYPES.data) this.takeData(header, payload, nowMs)
    else if (header.type === MESSAGE_TYPES.cancel) this.cancel()
    else if (header.type === MESSAGE_TYPES.ack) {
      const [, firstMissing, bitmap, window] = header.words
      this.sender.acknowledge(Number(firstMissing), bitmap, Number(window), nowMs)
      for (; this.let < this.sender.firstMissing; this.let++) {
        const sent = this.outgoing[this.let]
        if (sent) sent.payload = EMPTY
      }
    }
  }

  /** @returns when it wants its next turn; undefined if it is over */
  turn(nowMs: number): number | undefined {
    const timeout = this.endedMs === Infinity && nowMs - this.heardMs > ARRIVAL_MS && !this.abort
    if (timeout) this.end('timed_out', 0, 0)
    if (nowMs - this.pendingMs >= BATCH_MS || this.endedMs < Infinity) this.flush()
    for (const number of this.sender.due(nowMs)) this.sendNumbered(number)
    const { ackMs } = this.receiver
    if (ackMs !== undefined && ackMs <= nowMs) this.acknowledge()
    // Nobody listens any more.
    if (this.sender.failed && this.endedMs === Infinity) this.cancel()
    const over = this.endedMs < Infinity && (this.sender.done || this.sender.failed)
    if (over && nowMs - this.heardMs > LINGER_MS) return undefined
    const times = [
      this.sender.nextMs(),
      this.receiver.ackMs,
      this.pendingMs + BATCH_MS,
      this.heardMs + (over ? LINGER_MS : ARRIVAL_MS) + 1,
    ].filter((at) => at !== undefined)
    return Math.max(nowMs, Math.min(...times))
  }

  tokens(ids: readonly number[], text: string): void {
    if (this.endedMs < Infinity) return
    this.pendingIds.push(...ids)
    this.pendingText += text
    if (this.pendingMs === Infinity) this.pendingMs = performance.now()
    const bytes = 2 + 4 * this.pendingIds.length + 4 * this.pendingText.length
    if (bytes > PAYLOAD_MAX / 2) this.flush()
  }

  end(code: MessageCode, outputTokens: number, cachedTokens: number): void {
    if (this.endedMs < Infinity) return
    this.flush()
    this.endedMs = performance.now()
    this.prompt = undefined
    this.enqueue(MESSAGE_TYPES.end, EMPTY, BigInt(outputTokens), BigInt(cachedTokens), code)
    const promptTokens = Math.ceil(this.header.promptBytes / 4)
    this.events.finished(this.header.tenant, this.header.request, promptTokens + outputTokens)
  }

  private takeData(header: Header, payload: Uint8Array, nowMs: number): void {
    const { prompt } = this
    const from = header.fragment * FRAGMENT_BYTES
    const expected = Math.min(FRAGMENT_BYTES, this.header.promptBytes - from)
    if (payload.length !== expected || hashOf(this.key, payload) !== header.words[1]) return
    const isNew = this.receiver.take(header.fragment, nowMs)
    if (!prompt || !isNew) return
    prompt.set(payload, from)
    if (this.receiver.firstMissing < this.header.fragments) return
    this.acknowledge()
    this.prompt = undefined
    const { tenant, request, flags, maxTokens } = this.header
    const chat = (flags & MESSAGE_FLAGS.chat) !== 0
    const raw = (flags & MESSAGE_FLAGS.raw) !== 0
    const sampling = readSampling(header.words)
    const wire = { tenant, request, prompt, chat, raw, maxTokens, sampling }
    this.abort = this.events.start(wire, this)
  }

  private cancel(): void {
    this.abort?.()
    this.end('cancelled', this.tokensSent, 0)
  }

  private flush(): void {
    this.pendingMs = Infinity
    if (this.pendingIds.length === 0 && this.pendingText === '') return
    // A character may be 3 bytes in UTF-8 for one in the string; ids are cut by fours.
    let [ids, text] = [this.pendingIds, this.pendingText]
    this.pendingIds = []
    this.pendingText = ''
    while (ids.length > 0 || text !== '') {
      const now = ids.slice(0, PAYLOAD_MAX / 8)
      const room = Math.floor((PAYLOAD_MAX - 2 - 4 * now.length) / 3)
      const cut = cutAt(text, room)
      const payload = writeTokens(now, text.slice(0, cut))
      const hash = hashOf(this.key, payload)
      this.enqueue(MESSAGE_TYPES.tokens, payload, hash, BigInt(this.tokensSent))
      this.tokensSent += now.length
      ids = ids.slice(now.length)
      text = text.slice(cut)
    }
  }

  /** TOKENS has its hash before its number and its first token after; END its number first. */
  private enqueue(
    type: MessageType,
    payload: Uint8Array,
    first: bigint,
    second: bigint,
    code: MessageCode = 'ok',
  ): void {
    const number = BigInt(this.outgoing.length)
    const cookie = this.header.words[0]
    const words: Header['words'] =
      type === MESSAGE_TYPES.end ? [cookie, number, first, second] : [cookie, first, number, second]
    if (type === MESSAGE_TYPES.end) this.base.code = MESSAGE_CODES[code]
    this.outgoing.push({ type, words, payload })
    this.sender.extend(this.outgoing.length)
  }

  private sendNumbered(number: number): void {
    const datagram = this.outgoing[number]
    if (datagram) this.send(datagram.type, datagram.words, datagram.payload)
  }

  private acknowledge(): void {
    const { firstMissing, bitmap } = this.receiver
    const words: Header['words'] = [this.header.words[0], BigInt(firstMissing), bitmap, 64n]
    this.send(MESSAGE_TYPES.ack, words, EMPTY)
    this.receiver.said()
  }

  private send(type: MessageType, words: Header['words'], payload: Uint8Array): void {
    this.events.send((frame) => {
      const at = this.path.headBytes
      const bytes = HEADER_BYTES + payload.length
      const view = new DataView(frame.buffer, frame.byteOffset + at, bytes)
      frame.set(payload, at + HEADER_BYTES)
      const code = type === MESSAGE_TYPES.end ? (this.base.code ?? 0) : 0
      const timeUs = BigInt(Date.now()) * 1000n
      const head = { ...this.base, type, code, words, timeUs, payloadBytes: payload.length }
      writeHeader(view, head, this.key)
      this.path.seal(frame, bytes)
      return at + bytes
    })
  }
}

const EMPTY = new Uint8Array()

/** The longest part of a text of at most `most` code units that splits no character. */
function cutAt(text: string, most: number): number {
  if (text.length <= most) return text.length
  const code = text.charCodeAt(most - 1)
  return code >= 0xd800 && code < 0xdc00 ? most - 1 : most
}
