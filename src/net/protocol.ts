// Owns the datagram protocol on this side of the wire: headers as objects and as bytes, MACs,
// cookies and prefix hashes. docs/protocol.md specifies it; bpf/protocol.h is the kernel's view.

import { type SipKey, sipHash, sipPrefixes } from './siphash.ts'

export const PROTOCOL_VERSION = 1
export const PROTOCOL_PORT = 7411
export const HEADER_BYTES = 96
/** Of a prompt, in one DATA datagram. */
export const FRAGMENT_BYTES = 1200
export const TENANTS_MAX = 1024
export const PROMPT_BYTES_MAX = 1 << 26
export const MAX_TOKENS_MAX = 1 << 20
/**
 * Lengths of the prefixes that can be published, in bytes: steps of 1.5 and 1.33. With steps of 4 a
 * system prompt that all chats share would often be all that is known of one (bench/steering.ts).
 */
export const PREFIX_LADDER = [
  1024, 1536, 2048, 3072, 4096, 6144, 8192, 12_288, 16_384, 24_576, 32_768, 49_152, 65_536,
] as const

const MAGIC = 0x4c54
const MAC_AT = 88

export const MESSAGE_TYPES = {
  hello: 1,
  grant: 2,
  reject: 3,
  data: 4,
  ack: 5,
  tokens: 6,
  end: 7,
  cancel: 8,
} as const

export type MessageType = (typeof MESSAGE_TYPES)[keyof typeof MESSAGE_TYPES]

/** Of REJECT and END. */
export const MESSAGE_CODES = {
  ok: 0,
  length: 1,
  cancelled: 2,
  timed_out: 3,
  failed: 4,
  version: 16,
  clock: 17,
  malformed: 18,
  model: 19,
  request_reused: 20,
  busy: 21,
  tenant_busy: 22,
  rate: 23,
  no_replica: 24,
  context: 25,
  prompt: 26,
  too_large: 27,
  replica_lost: 28,
} as const

export type MessageCode = keyof typeof MESSAGE_CODES

export const MESSAGE_FLAGS = { chat: 1, raw: 2, retry: 4 } as const

/** Every datagram's first 96 bytes but for the magic number and the MAC. */
export interface Header {
  version: number
  type: number
  payloadBytes: number
  flags: number
  tenant: number
  key: number
  code: number
  request: bigint
  timeUs: bigint
  route: number
  model: number
  promptBytes: number
  maxTokens: number
  deadlineMs: number
  fragment: number
  fragments: number
  words: [bigint, bigint, bigint, bigint]
}

/** Writes a header with its MAC at the start of a datagram. Fields that are left out are 0. */
export function writeHeader(to: DataView, header: Partial<Header>, key: SipKey): void {
  const h = header
  to.setUint16(0, MAGIC)
  to.setUint8(2, h.version ?? PROTOCOL_VERSION)
  to.setUint8(3, h.type ?? 0)
  to.setUint16(4, h.payloadBytes ?? 0)
  to.setUint16(6, h.flags ?? 0)
  to.setUint32(8, h.tenant ?? 0)
  to.setUint16(12, h.key ?? 0)
  to.setUint16(14, h.code ?? 0)
  to.setBigUint64(16, h.request ?? 0n)
  to.setBigUint64(24, h.timeUs ?? 0n)
  to.setUint32(32, h.route ?? 0)
  to.setUint32(36, h.model ?? 0)
  to.setUint32(40, h.promptBytes ?? 0)
  to.setUint32(44, h.maxTokens ?? 0)
  to.setUint32(48, h.deadlineMs ?? 0)
  to.setUint16(52, h.fragment ?? 0)
  to.setUint16(54, h.fragments ?? 0)
  for (let i = 0; i < 4; i++) to.setBigUint64(56 + 8 * i, h.words?.[i] ?? 0n)
  sipHash(key, to, 0, MAC_AT, to, MAC_AT)
}

const mac = new DataView(new ArrayBuffer(8))

/** Reads a datagram's header; undefined if it is not one, or its MAC is not by this key. */
export function readHeader(from: DataView, key: SipKey): Header | undefined {
  if (!isDatagram(from, 0, from.byteLength) || !isHash(key, from, 0, MAC_AT, MAC_AT))
    return undefined
  return headerAt(from, 0)
}

/** Whether bytes begin as a datagram does, and are as many as it says. */
export function isDatagram(view: DataView, at: number, bytes: number): boolean {
  if (bytes < HEADER_BYTES || view.getUint16(at) !== MAGIC) return false
  return bytes === HEADER_BYTES + view.getUint16(at + 4)
}

/** Whether the hash of bytes [from, to) is what lies at `at`. */
export function isHash(key: SipKey, view: DataView, from: number, to: number, at: number): boolean {
  sipHash(key, view, from, to, mac, 0)
  return mac.getInt32(0) === view.getInt32(at) && mac.getInt32(4) === view.getInt32(at + 4)
}

/** Where a header's fields lie that are read without the others. */
export const FIELDS = {
  type: 3,
  flags: 6,
  tenant: 8,
  key: 12,
  request: 16,
  promptBytes: 40,
  fragment: 52,
  words: 56,
} as const

/** A header's fields, unchecked. */
export function headerAt(view: DataView, at: number): Header {
  return {
    version: view.getUint8(at + 2),
    type: view.getUint8(at + 3),
    payloadBytes: view.getUint16(at + 4),
    flags: view.getUint16(at + 6),
    tenant: view.getUint32(at + 8),
    key: view.getUint16(at + 12),
    code: view.getUint16(at + 14),
    request: view.getBigUint64(at + 16),
    timeUs: view.getBigUint64(at + 24),
    route: view.getUint32(at + 32),
    model: view.getUint32(at + 36),
    promptBytes: view.getUint32(at + 40),
    maxTokens: view.getUint32(at + 44),
    deadlineMs: view.getUint32(at + 48),
    fragment: view.getUint16(at + 52),
    fragments: view.getUint16(at + 54),
    words: [
      view.getBigUint64(at + 56),
      view.getBigUint64(at + 64),
      view.getBigUint64(at + 72),
      view.getBigUint64(at + 80),
    ],
  }
}

/** The SipHash of bytes as the number that a header carries. */
export function hashOf(key: SipKey, bytes: Uint8Array): bigint {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  sipHash(key, view, 0, bytes.length, mac, 0)
  return mac.getBigUint64(0)
}

/** The hash of each of these lengths, ascending, of a prompt that is no shorter. */
export function allPrefixHashes(
  key: SipKey,
  prompt: Uint8Array,
  lengths: readonly number[],
): bigint[] {
  const view = new DataView(prompt.buffer, prompt.byteOffset, prompt.byteLength)
  return sipPrefixes(key, view, lengths)
}

/** What a HELLO says of its prompt: its four longest prefixes, ascending, then zeros. */
export function prefixHashes(key: SipKey, prompt: Uint8Array): Header['words'] {
  const lengths = PREFIX_LADDER.filter((bytes) => bytes <= prompt.length).slice(-4)
  const hashes = allPrefixHashes(key, prompt, lengths)
  return [...hashes, 0n, 0n, 0n, 0n].slice(0, 4) as Header['words']
}

/** @param address 16 bytes; IPv4 as ::ffff:a.b.c.d */
export function cookieOf(
  secret: SipKey,
  { tenant, route, request }: Pick<Header, 'tenant' | 'route' | 'request'>,
  address: Uint8Array,
  port: number,
): bigint {
  const proof = new DataView(new ArrayBuffer(36))
  proof.setUint32(0, tenant)
  proof.setUint32(4, route)
  proof.setBigUint64(8, request)
  new Uint8Array(proof.buffer).set(address, 16)
  proof.setUint32(32, port)
  return hashOf(secret, new Uint8Array(proof.buffer))
}

/** FNV-1a of a model's name, as the header carries it. */
export function modelHash(name: string): number {
  let hash = 0x811c9dc5
  for (const byte of Buffer.from(name)) hash = Math.imul(hash ^ byte, 0x01000193)
  return hash >>> 0
}

export function fragmentsOf(promptBytes: number): number {
  return Math.ceil(promptBytes / FRAGMENT_BYTES)
}

export interface WireSampling {
  /** 0 is greedy. */
  temperature: number
  /** 1 is off. */
  topP: number
  seed: bigint
}

const floats = new DataView(new ArrayBuffer(8))

/** Words 2 and 3 of DATA. */
export function writeSampling({ temperature, topP, seed }: WireSampling): [bigint, bigint] {
  floats.setFloat32(0, temperature)
  floats.setFloat32(4, topP === 1 ? 0 : topP)
  return [floats.getBigUint64(0), BigInt.asUintN(64, seed)]
}

export function readSampling([, , word, seed]: Header['words']): WireSampling {
  floats.setBigUint64(0, word)
  const topP = floats.getFloat32(4)
  return { temperature: floats.getFloat32(0), topP: topP === 0 ? 1 : topP, seed }
}

export interface WireUsage {
  promptTokens: number
  /** Of the prompt, found in the server's memory. */
  cachedTokens: number
  outputTokens: number
}

/** Words 2 and 3 of END. */
export function writeUsage({
  promptTokens,
  cachedTokens,
  outputTokens,
}: WireUsage): [bigint, bigint] {
  return [BigInt(outputTokens), (BigInt(promptTokens) << 32n) | BigInt(cachedTokens)]
}

export function readUsage([, , output, prompt]: Header['words']): WireUsage {
  return {
    promptTokens: Number(prompt >> 32n),
    cachedTokens: Number(prompt & 0xffffffffn),
    outputTokens: Number(output),
  }
}

/** The payload of TOKENS: count, ids, text. */
export function writeTokens(tokens: readonly number[], text: string): Uint8Array {
  const utf8 = Buffer.from(text)
  const bytes = new Uint8Array(2 + 4 * tokens.length + utf8.length)
  const view = new DataView(bytes.buffer)
  view.setUint16(0, tokens.length)
  tokens.forEach((token, i) => view.setUint32(2 + 4 * i, token))
  bytes.set(utf8, 2 + 4 * tokens.length)
  return bytes
}

/** Undefined if the payload is shorter than it says. */
export function readTokens(payload: Uint8Array): { tokens: Uint32Array; text: string } | undefined {
  const view = new DataView(payload.buffer, payload.byteOffset, payload.byteLength)
  const count = payload.length < 2 ? Infinity : view.getUint16(0)
  if (payload.length < 2 + 4 * count) return undefined
  const tokens = Uint32Array.from({ length: count }, (_, i) => view.getUint32(2 + 4 * i))
  return { tokens, text: Buffer.from(payload.subarray(2 + 4 * count)).toString('utf8') }
}
