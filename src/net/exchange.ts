// Owns the answer to one request at a replica, from its complete prompt to the last repeat of END.
// No I/O, no clock of its own.

import type { ReturnPath } from './frame.ts'
import { NumberedSender } from './numbered.ts'
import {
  FRAGMENT_BYTES,
  type Header,
  HEADER_BYTES,
  hashOf,
  MESSAGE_CODES,
  MESSAGE_TYPES,
  type MessageCode,
  type MessageType,
  type WireSampling,
  writeHeader,
  writeTokens,
  type WireUsage,
  writeUsage,
} from './protocol.ts'
import type { SipKey } from './siphash.ts'
import type { Turned } from './turns.ts'

/** A prompt that is complete. */
export interface WireRequest {
  tenant: number
  request: bigint
  /** The replica that was chosen; counts from 1. */
  route: number
  /**
   * UTF-8; JSON messages if `chat`. If it is a part of a larger buffer, that is somebody else's:
   * it holds until `start` returns.
   */
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

/** A request as the intake of its prompt knows it. */
export interface Flow {
  /** Its own as long as it is there. */
  readonly id: number
  readonly tenant: number
  readonly request: bigint
  readonly route: number
  readonly cookie: bigint
  readonly flags: number
  readonly maxTokens: number
  readonly sampling: WireSampling
  /** Which of the tenant's two signs for it. */
  readonly keyIndex: number
  readonly key: SipKey
  readonly arrivedBytes: number
  /** What the client said last of the datagrams that it takes. */
  readonly credit: number
  path(): ReturnPath
  /** Its answer is over: only repeats are answered, while any come, until then at most. */
  linger(untilMs: number): void
}

/** What an exchange needs of its surroundings. */
export interface ExchangeWorld {
  /** Milliseconds that never go back. */
  now(): number
  /** µs since 1970. */
  timeUs(): bigint
  /** It is over: for so many tokens its tenant is charged. */
  finished(tenant: number, request: bigint, usedTokens: number): void
  /** Sends a frame that `write` fills and measures. */
  send(write: (frame: Uint8Array) => number): void
  /** Something is to be sent: it needs a turn. */
  touch(exchange: Exchange): void
}

/** A datagram's text and ids, at most: with the header it fits what DATA fits. */
const PAYLOAD_MAX = FRAGMENT_BYTES
/** Tokens wait so long for others of their flow: half of what a fast decode step takes. */
export const BATCH_MS = 4
/** It is forgotten after so long in any case, whatever its client does. */
export const FORGET_MS = 30_000

const EMPTY = new Uint8Array()
const NO_USAGE: WireUsage = { promptTokens: 0, cachedTokens: 0, outputTokens: 0 }

export class Exchange implements WireAnswer, Turned {
  queuedMs = Infinity
  isTouched = false
  readonly flow: Flow
  private readonly world: ExchangeWorld
  private path: ReturnPath | undefined
  /** From the first datagram on. */
  private sender: NumberedSender | undefined
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
  private endedMs = Infinity
  private isOver = false

  constructor(flow: Flow, world: ExchangeWorld) {
    this.flow = flow
    this.world = world
  }

  /** Everything was said and heard: only repeats are left to answer. */
  get settled(): boolean {
    const { sender } = this
    return this.endedMs < Infinity && (sender === undefined || sender.done || sender.failed)
  }

  /** @param abort of what answers, if it has not ended at once */
  started(abort: () => void): void {
    if (this.endedMs === Infinity) this.abort = abort
  }

  /** What the client says of what was sent. */
  acknowledge(firstMissing: number, bitmap: bigint, credit: number): void {
    const { sender } = this
    if (!sender) return
    sender.acknowledge(firstMissing, bitmap, credit, this.world.now())
    for (; this.released < sender.firstMissing; this.released++) {
      this.payloads[this.released] = EMPTY
    }
    this.world.touch(this)
  }

  cancel(code: MessageCode): void {
    this.abort?.()
    this.end(code, { ...NO_USAGE, outputTokens: this.tokensTold })
  }

  /** Sends what is due. Returns when it wants its next turn; undefined if it is over. */
  turn(): number | undefined {
    if (this.isOver) return undefined
    const now = this.world.now()
    if (this.sender?.failed) this.cancel('cancelled')
    if (now - this.pendingMs >= BATCH_MS) this.flush()
    for (const number of this.sender?.due(now) ?? []) this.sendNumbered(number)
    if (this.settled || now - this.endedMs > FORGET_MS) {
      this.isOver = true
      this.flow.linger(this.endedMs + FORGET_MS)
      return undefined
    }
    const next = Math.min(
      this.sender?.nextMs() ?? Infinity,
      this.pendingMs + BATCH_MS,
      this.endedMs + FORGET_MS + 1,
    )
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
    this.abort = undefined
    const { tenant, request, cookie, arrivedBytes } = this.flow
    const number = BigInt(this.outgoing.length)
    const end: Header['words'] = [cookie, number, ...writeUsage(usage)]
    this.enqueue(MESSAGE_TYPES.end, MESSAGE_CODES[code], end, EMPTY)
    this.world.finished(tenant, request, Math.ceil(arrivedBytes / 4) + usage.outputTokens)
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
      const hash = hashOf(this.flow.key, payload)
      this.enqueue(MESSAGE_TYPES.tokens, 0, [this.flow.cookie, hash, number, first], payload)
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
    this.sender ??= this.openSender()
    this.outgoing.push({ type, code, words })
    this.payloads.push(payload)
    this.sender.extend(this.outgoing.length)
  }

  private openSender(): NumberedSender {
    const sender = new NumberedSender()
    sender.acknowledge(0, 0n, this.flow.credit, this.world.now())
    return sender
  }

  private sendNumbered(number: number): void {
    const datagram = this.outgoing[number]
    if (!datagram) return
    const payload = this.payloads[number] ?? EMPTY
    const path = (this.path ??= this.flow.path())
    const { tenant, keyIndex, key, request, route } = this.flow
    const timeUs = this.world.timeUs()
    const payloadBytes = payload.length
    const header = { ...datagram, tenant, key: keyIndex, request, route, timeUs, payloadBytes }
    this.world.send((frame) => writeFrame(frame, path, header, payload, key))
  }
}

/** Returns its bytes. */
export function writeFrame(
  frame: Uint8Array,
  path: ReturnPath,
  header: Partial<Header>,
  payload: Uint8Array,
  key: SipKey,
): number {
  const at = path.headBytes
  const bytes = HEADER_BYTES + payload.length
  const view = new DataView(frame.buffer, frame.byteOffset + at, bytes)
  frame.set(payload, at + HEADER_BYTES)
  writeHeader(view, header, key)
  path.seal(frame, bytes)
  return at + bytes
}

/** The longest part of a text of at most `most` code units that splits no character. */
function cutAt(text: string, most: number): number {
  if (text.length <= most) return text.length
  const code = text.charCodeAt(most - 1)
  return code >= 0xd800 && code < 0xdc00 ? most - 1 : most
}
