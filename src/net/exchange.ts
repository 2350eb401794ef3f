// Owns one request at a replica, from its first DATA to the last repeat of its END. No I/O, no
// clock of its own.

import type { ReturnPath } from './frame.ts'
import type { Turned } from './turns.ts'
import { NumberedReceiver, NumberedSender } from './numbered.ts'
import {
  FIELDS,
  FRAGMENT_BYTES,
  fragmentsOf,
  type Header,
  HEADER_BYTES,
  hashOf,
  isHash,
  MESSAGE_CODES,
  MESSAGE_FLAGS,
  MESSAGE_TYPES,
  type MessageCode,
  type MessageType,
  readSampling,
  type WireSampling,
  writeHeader,
  writeTokens,
  type WireUsage,
  writeUsage,
} from './protocol.ts'
import type { SipKey } from './siphash.ts'

/** A prompt that is complete. */
export interface WireRequest {
  tenant: number
  request: bigint
  /** The replica that was chosen; counts from 1. */
  route: number
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
  /** Once, last; what comes later is ignored. */
  end(code: MessageCode, usage: WireUsage): void
}

/** What an exchange needs of its surroundings. */
export interface ExchangeWorld {
  /** Milliseconds that never go back. */
  now(): number
  /** µs since 1970. */
  timeUs(): bigint
  /** Starts a request; returns what aborts it. */
  start(request: WireRequest, answer: WireAnswer): () => void
  /** It is over: for so many tokens its tenant is charged. */
  finished(tenant: number, request: bigint, usedTokens: number): void
  /** Sends a frame that `write` fills and measures. */
  send(write: (frame: Uint8Array) => number): void
  /** Something is to be sent: it needs a turn. */
  touch(exchange: Exchange): void
  /** Takes memory for a prompt (gives it back, if negative): the code that refuses it, or 'ok'. */
  reserve(tenant: number, bytes: number): MessageCode
}

/** A datagram's text and ids, at most: with the header it fits what DATA fits. */
const PAYLOAD_MAX = FRAGMENT_BYTES
/** Tokens wait so long for others of their flow: half of what a fast decode step takes. */
export const BATCH_MS = 4
/** A prompt that takes longer between two fragments has lost its sender. */
export const ARRIVAL_MS = 10_000
/** A client says something every 2 s; one that is silent for so long is gone. */
export const SILENCE_MS = 15_000
/** An ended request still answers late repeats for so long. */
export const LINGER_MS = 4_000
/** It is forgotten after so long in any case, whatever its client does. */
export const FORGET_MS = 30_000
/** Memory for so many fragments is taken at a time, then twice as much. */
const FIRST_FRAGMENTS = 64

const EMPTY = new Uint8Array()
const NO_USAGE: WireUsage = { promptTokens: 0, cachedTokens: 0, outputTokens: 0 }

export class Exchange implements WireAnswer, Turned {
  queuedMs = Infinity
  isTouched = false
  /** Another one that the replica finds at the same place. */
  next: Exchange | undefined
  /** What the replica has counted it as. */
  wasSettled = false
  /** Of its number, the upper and the lower half. */
  readonly high: number
  readonly low: number
  /** As its first DATA had them; the program compared them with what was charged. */
  readonly asked: Header
  private readonly key: SipKey
  private readonly path: ReturnPath
  private readonly world: ExchangeWorld
  private readonly fragments: number
  /** Undefined once it is complete, or not wanted any more. */
  private prompt: Uint8Array | undefined = EMPTY
  private arrivedBytes = 0
  private readonly receiver = new NumberedReceiver()
  private readonly sender = new NumberedSender()
  /** Numbered datagrams to send; those that have arrived are let go. */
  private readonly outgoing: Pick<Header, 'type' | 'code' | 'words'>[] = []
  private readonly payloads: Uint8Array[] = []
  private released = 0
  private abort: (() => void) | undefined
  private pendingIds: number[] = []
  private pendingText = ''
  private pendingMs = Infinity
  private tokensTold = 0
  private tokensSent = 0
  private heardMs: number
  private readonly dueMs: number
  private endedMs = Infinity

  constructor(first: Header, key: SipKey, path: ReturnPath, world: ExchangeWorld) {
    this.asked = first
    this.high = Number(first.request >> 32n)
    this.low = Number(first.request & 0xffffffffn)
    this.key = key
    this.path = path
    this.world = world
    this.fragments = fragmentsOf(first.promptBytes)
    this.heardMs = world.now()
    this.dueMs = first.deadlineMs === 0 ? Infinity : this.heardMs + first.deadlineMs
  }

  /** Everything was said and heard: only repeats are left to answer. */
  get settled(): boolean {
    return this.endedMs < Infinity && (this.sender.done || this.sender.failed)
  }

  /** @param at where the datagram begins, of so many bytes */
  take(view: DataView, at: number, bytes: number): void {
    const now = this.world.now()
    this.heardMs = now
    this.world.touch(this)
    const type = view.getUint8(at + FIELDS.type)
    if (type === MESSAGE_TYPES.data) this.takeData(view, at, bytes, now)
    else if (type === MESSAGE_TYPES.cancel) this.cancel('cancelled')
    else if (type === MESSAGE_TYPES.ack) {
      const word = (index: number) => view.getBigUint64(at + FIELDS.words + 8 * index)
      this.sender.acknowledge(Number(word(1)), word(2), Number(word(3)), now)
      for (; this.released < this.sender.firstMissing; this.released++) {
        this.payloads[this.released] = EMPTY
      }
      if (view.getUint16(at + FIELDS.flags) & MESSAGE_FLAGS.retry) this.receiver.asked(now)
    }
  }

  /** Sends what is due. Returns when it wants its next turn; undefined if it is over. */
  turn(): number | undefined {
    const now = this.world.now()
    this.giveUp(now)
    if (now - this.pendingMs >= BATCH_MS) this.flush()
    for (const number of this.sender.due(now)) this.sendNumbered(number)
    const { ackMs } = this.receiver
    if (ackMs !== undefined && ackMs <= now) this.acknowledge()
    const ended = this.endedMs < Infinity
    const patienceMs = ended ? LINGER_MS : this.abort ? SILENCE_MS : ARRIVAL_MS
    const over = this.settled && now - this.heardMs > LINGER_MS
    if (over || now - this.endedMs > FORGET_MS) return undefined
    let next = Math.min(
      this.sender.nextMs() ?? Infinity,
      this.receiver.ackMs ?? Infinity,
      this.pendingMs + BATCH_MS,
      this.endedMs + FORGET_MS + 1,
    )
    if (!ended) next = Math.min(next, this.dueMs)
    if (!ended || this.settled) next = Math.min(next, this.heardMs + patienceMs + 1)
    return Math.max(now, next)
  }

  tokens(ids: readonly number[], text: string): void {
    if (this.endedMs < Infinity) return
    this.world.touch(this)
    this.pendingIds.push(...ids)
    this.pendingText += text
    this.tokensTold += ids.length
    if (this.pendingMs === Infinity) this.pendingMs = this.world.now()
    const bytes = 2 + 4 * this.pendingIds.length + 3 * this.pendingText.length
    if (bytes > PAYLOAD_MAX / 2) this.flush()
  }

  end(code: MessageCode, usage: WireUsage): void {
    if (this.endedMs < Infinity) return
    this.world.touch(this)
    this.flush()
    this.endedMs = this.world.now()
    this.dropPrompt()
    this.abort = undefined
    const { tenant, request, words } = this.asked
    const number = BigInt(this.outgoing.length)
    const end: Header['words'] = [words[0], number, ...writeUsage(usage)]
    this.enqueue(MESSAGE_TYPES.end, MESSAGE_CODES[code], end, EMPTY)
    this.world.finished(tenant, request, Math.ceil(this.arrivedBytes / 4) + usage.outputTokens)
  }

  private giveUp(now: number): void {
    if (this.endedMs < Infinity) return
    const silentMs = now - this.heardMs
    if (now >= this.dueMs || (!this.abort && silentMs > ARRIVAL_MS)) this.cancel('timed_out')
    else if (this.sender.failed || silentMs > SILENCE_MS) this.cancel('cancelled')
  }

  private takeData(view: DataView, at: number, bytes: number, now: number): void {
    const fragment = view.getUint16(at + FIELDS.fragment)
    if (fragment >= this.fragments) return
    const from = fragment * FRAGMENT_BYTES
    const payloadAt = at + HEADER_BYTES
    const payloadBytes = bytes - HEADER_BYTES
    if (payloadBytes !== Math.min(FRAGMENT_BYTES, this.asked.promptBytes - from)) return
    if (!isHash(this.key, view, payloadAt, at + bytes, at + FIELDS.words + 8)) return
    const isNew = this.receiver.take(fragment, now)
    if (!this.prompt || !isNew || !this.makeRoom(from + payloadBytes)) return
    this.prompt.set(new Uint8Array(view.buffer, view.byteOffset + payloadAt, payloadBytes), from)
    this.arrivedBytes += payloadBytes
    if (this.receiver.firstMissing === this.fragments) this.start()
  }

  /** What has not arrived takes no memory: else a few datagrams could take it all. */
  private makeRoom(bytes: number): boolean {
    const { prompt, asked } = this
    if (!prompt || bytes <= prompt.length) return prompt !== undefined
    const least = Math.max(bytes, 2 * prompt.length, FIRST_FRAGMENTS * FRAGMENT_BYTES)
    const wanted = Math.min(asked.promptBytes, least)
    const refused = this.world.reserve(asked.tenant, wanted - prompt.length)
    if (refused !== 'ok') {
      this.end(refused, NO_USAGE)
      return false
    }
    this.prompt = new Uint8Array(wanted)
    this.prompt.set(prompt)
    return true
  }

  private start(): void {
    const { tenant, request, route, flags, maxTokens, words } = this.asked
    const prompt = this.prompt ?? EMPTY
    const chat = (flags & MESSAGE_FLAGS.chat) !== 0
    const raw = (flags & MESSAGE_FLAGS.raw) !== 0
    const sampling = readSampling(words)
    this.acknowledge()
    this.dropPrompt()
    const wire = { tenant, request, route, prompt, chat, raw, maxTokens, sampling }
    const abort = this.world.start(wire, this)
    if (this.endedMs === Infinity) this.abort = abort
  }

  private dropPrompt(): void {
    if (this.prompt) this.world.reserve(this.asked.tenant, -this.prompt.length)
    this.prompt = undefined
  }

  private cancel(code: MessageCode): void {
    this.abort?.()
    this.end(code, { ...NO_USAGE, outputTokens: this.tokensTold })
  }

  private flush(): void {
    this.pendingMs = Infinity
    let [ids, text] = [this.pendingIds, this.pendingText]
    this.pendingIds = []
    this.pendingText = ''
    while (ids.length > 0 || text !== '') {
      const now = ids.slice(0, PAYLOAD_MAX / 8)
      // A code unit of the string takes at most 3 bytes of UTF-8.
      const room = Math.floor((PAYLOAD_MAX - 2 - 4 * now.length) / 3)
      const cut = cutAt(text, room)
      const payload = writeTokens(now, text.slice(0, cut))
      const number = BigInt(this.outgoing.length)
      const first = BigInt(this.tokensSent)
      const hash = hashOf(this.key, payload)
      this.enqueue(MESSAGE_TYPES.tokens, 0, [this.asked.words[0], hash, number, first], payload)
      this.tokensSent += now.length
      ids = ids.slice(now.length)
      text = text.slice(cut)
    }
  }

  private enqueue(
    type: MessageType,
    code: number,
    words: Header['words'],
    payload: Uint8Array,
  ): void {
    this.outgoing.push({ type, code, words })
    this.payloads.push(payload)
    this.sender.extend(this.outgoing.length)
  }

  private sendNumbered(number: number): void {
    const datagram = this.outgoing[number]
    if (datagram) this.send(datagram, this.payloads[number] ?? EMPTY)
  }

  private acknowledge(): void {
    const { firstMissing, bitmap, ahead } = this.receiver
    const words: Header['words'] = [
      this.asked.words[0],
      BigInt(firstMissing),
      bitmap,
      BigInt(ahead),
    ]
    this.send({ type: MESSAGE_TYPES.ack, code: 0, words }, EMPTY)
    this.receiver.said()
  }

  private send(
    { type, code, words }: Pick<Header, 'type' | 'code' | 'words'>,
    payload: Uint8Array,
  ): void {
    const { tenant, key, request, route } = this.asked
    const timeUs = this.world.timeUs()
    const payloadBytes = payload.length
    const header = { type, code, tenant, key, request, route, words, timeUs, payloadBytes }
    this.world.send((frame) => {
      const at = this.path.headBytes
      const bytes = HEADER_BYTES + payload.length
      const view = new DataView(frame.buffer, frame.byteOffset + at, bytes)
      frame.set(payload, at + HEADER_BYTES)
      writeHeader(view, header, this.key)
      this.path.seal(frame, bytes)
      return at + bytes
    })
  }
}

/** The longest part of a text of at most `most` code units that splits no character. */
function cutAt(text: string, most: number): number {
  if (text.length <= most) return text.length
  const code = text.charCodeAt(most - 1)
  return code >= 0xd800 && code < 0xdc00 ? most - 1 : most
}
