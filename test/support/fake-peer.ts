// Owns a server of the datagram protocol for tests of clients: a UDP socket that grants or refuses,
// takes a prompt, and says a text.

import { createSocket, type RemoteInfo } from 'node:dgram'
import { NumberedReceiver } from '../../src/net/numbered.ts'
import {
  FRAGMENT_BYTES,
  type Header,
  HEADER_BYTES,
  hashOf,
  MESSAGE_CODES,
  MESSAGE_TYPES,
  type MessageCode,
  readHeader,
  writeHeader,
  writeTokens,
} from '../../src/net/protocol.ts'
import { sipKey } from '../../src/net/siphash.ts'

export interface FakePeer {
  port: number
  /** HELLOs as they came. */
  asked: Header[]
  /** Prompts as they were put together, and what they were sent with. */
  prompts: { text: string; header: Header }[]
  cancelled: bigint[]
  /** Refuses from now on with this; undefined grants. */
  refusal: { code: MessageCode; retryMs: number } | undefined
  close(): void
}

/** @param words are sent one a datagram; then the answer ends, unless `endless` */
export async function fakePeer(
  keyBytes: Uint8Array,
  words: readonly string[],
  { endless = false } = {},
): Promise<FakePeer> {
  const key = sipKey(keyBytes)
  const socket = createSocket('udp4')
  const arriving = new Map<bigint, { bytes: Uint8Array; receiver: NumberedReceiver }>()
  const peer: FakePeer = {
    port: 0,
    asked: [],
    prompts: [],
    cancelled: [],
    refusal: undefined,
    close: () => socket.close(),
  }

  function say(to: RemoteInfo, header: Partial<Header>, payload: Uint8Array = new Uint8Array()) {
    const datagram = new Uint8Array(HEADER_BYTES + payload.length)
    datagram.set(payload, HEADER_BYTES)
    const timeUs = BigInt(Date.now()) * 1000n
    const whole = {
      ...header,
      timeUs,
      payloadBytes: payload.length,
      deadlineMs: 0,
      ...refused(header),
    }
    writeHeader(new DataView(datagram.buffer), whole, key)
    socket.send(datagram, to.port, to.address)
  }

  function refused({ type }: Partial<Header>): Partial<Header> {
    if (type !== MESSAGE_TYPES.reject || !peer.refusal) return {}
    return { code: MESSAGE_CODES[peer.refusal.code], deadlineMs: peer.refusal.retryMs }
  }

  function onData(from: RemoteInfo, header: Header, payload: Uint8Array): void {
    const { promptBytes, request, fragment } = header
    const known = arriving.get(request)
    const arrived = known ?? {
      bytes: new Uint8Array(promptBytes),
      receiver: new NumberedReceiver(),
    }
    arriving.set(request, arrived)
    const { bytes, receiver } = arrived
    const isNew = receiver.take(fragment, performance.now())
    bytes.set(payload, fragment * FRAGMENT_BYTES)
    const ack: Header['words'] = [7n, BigInt(receiver.firstMissing), receiver.bitmap, 64n]
    say(from, { ...header, type: MESSAGE_TYPES.ack, words: ack })
    const whole = receiver.firstMissing * FRAGMENT_BYTES >= promptBytes
    if (!isNew || !whole) return
    peer.prompts.push({ text: Buffer.from(bytes).toString(), header })
    words.forEach((word, i) => {
      const tokens = writeTokens([i], word)
      const numbers: Header['words'] = [7n, hashOf(key, tokens), BigInt(i), BigInt(i)]
      say(from, { ...header, type: MESSAGE_TYPES.tokens, words: numbers }, tokens)
    })
    if (!endless) end(from, header, 'ok')
  }

  function end(to: RemoteInfo, header: Header, code: MessageCode): void {
    const count = BigInt(words.length)
    // 11 prompt tokens, 3 of them from the cache.
    const usage: Header['words'] = [7n, count, count, (11n << 32n) | 3n]
    say(to, { ...header, type: MESSAGE_TYPES.end, code: MESSAGE_CODES[code], words: usage })
  }

  socket.on('message', (message, from) => {
    const view = new DataView(message.buffer, message.byteOffset, message.byteLength)
    const header = readHeader(view, key)
    if (!header) return
    if (header.type === MESSAGE_TYPES.hello) {
      peer.asked.push(header)
      if (peer.refusal)
        say(from, { ...header, type: MESSAGE_TYPES.reject, words: [0n, 0n, 0n, 0n] })
      else say(from, { ...header, type: MESSAGE_TYPES.grant, route: 1, words: [7n, 64n, 0n, 0n] })
    } else if (header.type === MESSAGE_TYPES.data) {
      onData(from, header, message.subarray(HEADER_BYTES))
    } else if (header.type === MESSAGE_TYPES.cancel) {
      peer.cancelled.push(header.request)
      end(from, header, 'cancelled')
    }
  })
  await new Promise<void>((resolve) => socket.bind(0, '127.0.0.1', resolve))
  peer.port = socket.address().port
  return peer
}
