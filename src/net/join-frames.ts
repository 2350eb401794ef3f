// Owns what the owner of an interface and an engine that joined it say to each other, byte by byte:
// docs/protocol.md, "Several engines behind one interface". No I/O.

import type { WireRequest } from './exchange.ts'
import { PROMPT_BYTES_MAX, type WireUsage } from './protocol.ts'

/** Another version is refused in words: both sides of a machine are upgraded together. */
export const JOIN_VERSION = 1
const MAGIC = 0x4c54524a
export const FRAME_HEADER_BYTES = 12
const START_BYTES = 36
/** A longer frame is none. */
export const FRAME_BYTES_MAX = PROMPT_BYTES_MAX + START_BYTES

export const JOIN_TYPES = {
  join: 1,
  welcome: 2,
  refused: 3,
  start: 4,
  abort: 5,
  tokens: 6,
  end: 7,
  held: 8,
  gone: 9,
  load: 10,
  leave: 11,
} as const

export type JoinType = keyof typeof JOIN_TYPES

const NAMES = new Map<number, JoinType>(
  Object.entries(JOIN_TYPES).map(([name, type]) => [type, name as JoinType]),
)

export interface JoinFrame {
  type: JoinType
  code: number
  id: number
  /** Of the bytes that were read, or of its own: nobody writes there again. */
  payload: Uint8Array
}

/** What a tenant is to an engine: a name, and the key that its prefixes are published under. */
export interface JoinTenant {
  index: number
  name: string
  key: Uint8Array
}

export interface Joining {
  model: string
  process: number
}

/** The 12 bytes before a payload. */
export function frameHeader(type: JoinType, id: number, code: number, bytes: number): Uint8Array {
  const view = new DataView(new ArrayBuffer(FRAME_HEADER_BYTES))
  view.setUint32(0, bytes)
  view.setUint8(4, JOIN_TYPES[type])
  view.setUint16(6, code)
  view.setUint32(8, id)
  return new Uint8Array(view.buffer)
}

/** Cuts a stream of bytes into frames. */
export class FrameReader {
  private readonly header = new Uint8Array(FRAME_HEADER_BYTES)
  private headerBytes = 0
  private payload: Uint8Array | undefined
  private payloadBytes = 0

  /**
   * @param take is told each frame that is complete
   * @returns false if the bytes are no frames; nothing that follows can be read then
   */
  read(chunk: Uint8Array, take: (frame: JoinFrame) => void): boolean {
    let at = 0
    while (at < chunk.length) {
      if (this.payload === undefined) {
        const part = chunk.subarray(at, at + FRAME_HEADER_BYTES - this.headerBytes)
        this.header.set(part, this.headerBytes)
        this.headerBytes += part.length
        at += part.length
        if (this.headerBytes < FRAME_HEADER_BYTES) return true
        const view = new DataView(this.header.buffer)
        const bytes = view.getUint32(0)
        if (bytes > FRAME_BYTES_MAX || !NAMES.has(view.getUint8(4))) return false
        this.payloadBytes = 0
        // What has come in one piece is read where it lies.
        const isWhole = chunk.length - at >= bytes
        this.payload = isWhole ? chunk.subarray(at, at + bytes) : new Uint8Array(bytes)
        if (isWhole) {
          this.payloadBytes = bytes
          at += bytes
        }
      }
      const part = chunk.subarray(at, at + this.payload.length - this.payloadBytes)
      if (part.length > 0) this.payload.set(part, this.payloadBytes)
      this.payloadBytes += part.length
      at += part.length
      if (this.payloadBytes < this.payload.length) return true
      const { payload } = this
      this.payload = undefined
      this.headerBytes = 0
      const view = new DataView(this.header.buffer)
      const type = NAMES.get(view.getUint8(4))
      if (type) take({ type, code: view.getUint16(6), id: view.getUint32(8), payload })
    }
    return true
  }
}

export function writeJoin({ model, process }: Joining): Uint8Array {
  const name = Buffer.from(model)
  const bytes = new Uint8Array(12 + name.length)
  const view = new DataView(bytes.buffer)
  view.setUint32(0, MAGIC)
  view.setUint16(4, JOIN_VERSION)
  view.setUint32(8, process)
  bytes.set(name, 12)
  return bytes
}

/** What joins; its version, if that is another than ours; undefined if it is something else. */
export function readJoin(payload: Uint8Array): Joining | number | undefined {
  if (payload.length < 12) return undefined
  const view = viewOf(payload)
  if (view.getUint32(0) !== MAGIC) return undefined
  const version = view.getUint16(4)
  if (version !== JOIN_VERSION) return version
  return { model: textOf(payload.subarray(12)), process: view.getUint32(8) }
}

export function writeWelcome(tenants: readonly JoinTenant[]): Uint8Array {
  const parts = tenants.map(({ index, name, key }) => {
    const text = Buffer.from(name)
    const head = new DataView(new ArrayBuffer(21))
    head.setUint32(0, index)
    new Uint8Array(head.buffer).set(key, 4)
    head.setUint8(20, text.length)
    return [new Uint8Array(head.buffer), text]
  })
  return Buffer.concat(parts.flat())
}

/** Undefined if it ends within a tenant. */
export function readWelcome(payload: Uint8Array): JoinTenant[] | undefined {
  const view = viewOf(payload)
  const tenants: JoinTenant[] = []
  for (let at = 0; at < payload.length;) {
    if (at + 21 > payload.length) return undefined
    const nameEnd = at + 21 + view.getUint8(at + 20)
    if (nameEnd > payload.length) return undefined
    const key = Uint8Array.from(payload.subarray(at + 4, at + 20))
    tenants.push({
      index: view.getUint32(at),
      name: textOf(payload.subarray(at + 21, nameEnd)),
      key,
    })
    at = nameEnd
  }
  return tenants
}

/** START but for the prompt, which follows it as it is. */
export function writeStart(wire: WireRequest): Uint8Array {
  const view = new DataView(new ArrayBuffer(START_BYTES))
  const { temperature, topP, seed } = wire.sampling
  view.setUint32(0, wire.tenant)
  view.setUint32(4, wire.maxTokens)
  view.setUint32(8, (wire.chat ? CHAT : 0) | (wire.raw ? RAW : 0))
  view.setFloat32(12, temperature)
  view.setFloat32(16, topP)
  view.setBigUint64(20, seed)
  view.setBigUint64(28, wire.request)
  return new Uint8Array(view.buffer)
}

const CHAT = 1
const RAW = 2

/** Undefined if it has no prompt. */
export function readStart(payload: Uint8Array): Omit<WireRequest, 'route'> | undefined {
  if (payload.length <= START_BYTES) return undefined
  const view = viewOf(payload)
  const flags = view.getUint32(8)
  return {
    tenant: view.getUint32(0),
    request: view.getBigUint64(28),
    prompt: payload.subarray(START_BYTES),
    chat: (flags & CHAT) !== 0,
    raw: (flags & RAW) !== 0,
    maxTokens: view.getUint32(4),
    sampling: {
      temperature: view.getFloat32(12),
      topP: view.getFloat32(16),
      seed: view.getBigUint64(20),
    },
  }
}

export function writeEnd({ promptTokens, cachedTokens, outputTokens }: WireUsage): Uint8Array {
  const view = new DataView(new ArrayBuffer(12))
  view.setUint32(0, promptTokens)
  view.setUint32(4, cachedTokens)
  view.setUint32(8, outputTokens)
  return new Uint8Array(view.buffer)
}

export function readEnd(payload: Uint8Array): WireUsage | undefined {
  if (payload.length !== 12) return undefined
  const view = viewOf(payload)
  return {
    promptTokens: view.getUint32(0),
    cachedTokens: view.getUint32(4),
    outputTokens: view.getUint32(8),
  }
}

export function writeHashes(hashes: readonly bigint[]): Uint8Array {
  const view = new DataView(new ArrayBuffer(8 * hashes.length))
  hashes.forEach((hash, i) => view.setBigUint64(8 * i, hash))
  return new Uint8Array(view.buffer)
}

export function readHashes(payload: Uint8Array): bigint[] {
  const view = viewOf(payload)
  return Array.from({ length: payload.length >> 3 }, (_, i) => view.getBigUint64(8 * i))
}

function viewOf({ buffer, byteOffset, byteLength }: Uint8Array): DataView {
  return new DataView(buffer, byteOffset, byteLength)
}

function textOf(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString('utf8')
}
