// Owns the test vectors in docs/protocol.md: each ```text block that begins with "vector" is
// written anew from what the code makes. A test reads them again without that code.
//
//   node tools/protocol-vectors.ts

import { readFileSync, writeFileSync } from 'node:fs'
import {
  cookieOf,
  fragmentsOf,
  type Header,
  HEADER_BYTES,
  hashOf,
  MESSAGE_CODES,
  MESSAGE_TYPES,
  modelHash,
  prefixHashes,
  writeHeader,
  writeSampling,
  writeTokens,
  writeUsage,
} from '../src/net/protocol.ts'
import { sipKey } from '../src/net/siphash.ts'

const DOCUMENT = new URL('../docs/protocol.md', import.meta.url)
const BLOCK = /```text\nvector (\w+)\n[^]*?```/g

/** As in the paper that gives SipHash's own vectors. */
export const VECTOR_KEY = Uint8Array.from({ length: 16 }, (_, i) => i)
export const VECTOR_SECRET = Uint8Array.from({ length: 16 }, (_, i) => 0xf0 + i)
/** 10.1.2.3, port 40000. */
export const VECTOR_ADDRESS = Uint8Array.of(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 1, 2, 3)
export const VECTOR_PORT = 40_000
export const VECTOR_PROMPT = Buffer.from('Why is the sky blue? '.repeat(60))

if (import.meta.main) {
  writeFileSync(DOCUMENT, withCurrentVectors(readFileSync(DOCUMENT, 'utf8')))
}

/** The document with the datagrams that the code makes today. */
export function withCurrentVectors(text: string): string {
  const datagrams = vectors()
  return text.replaceAll(BLOCK, (_, name: string) => {
    const hex = Buffer.from(datagrams[name] ?? []).toString('hex')
    const lines = hex.match(/.{1,64}/g) ?? []
    return `\`\`\`text\nvector ${name}\n${lines.join('\n')}\n\`\`\``
  })
}

function vectors(): Record<string, Uint8Array> {
  const key = sipKey(VECTOR_KEY)
  const promptBytes = VECTOR_PROMPT.length
  const numbers = { model: modelHash('smollm2'), promptBytes, maxTokens: 100 }
  const who = { tenant: 5, request: 0x0123456789abcdefn, timeUs: 1_800_000_000_000_000n }
  const cookie = cookieOf(sipKey(VECTOR_SECRET), { ...who, route: 3 }, VECTOR_ADDRESS, VECTOR_PORT)
  const granted = { ...who, ...numbers, route: 3 }
  const last = VECTOR_PROMPT.subarray(1200)
  const sampling = writeSampling({ temperature: 0.5, topP: 0.9, seed: 42n })
  const tokens = writeTokens([10, 70_000], 'Blå')
  const usage = writeUsage({ promptTokens: 361, cachedTokens: 300, outputTokens: 2 })
  const fragments = fragmentsOf(promptBytes)
  const datagram = (
    header: Partial<Header>,
    payload: Uint8Array = new Uint8Array(),
  ): Uint8Array => {
    const bytes = new Uint8Array(HEADER_BYTES + payload.length)
    bytes.set(payload, HEADER_BYTES)
    const whole = { ...header, payloadBytes: payload.length }
    writeHeader(new DataView(bytes.buffer), whole, key)
    return bytes
  }
  const { hello, grant, data, ack, tokens: tokensType, end } = MESSAGE_TYPES
  return {
    hello: datagram({
      ...who,
      ...numbers,
      type: hello,
      deadlineMs: 2000,
      fragments,
      words: prefixHashes(key, VECTOR_PROMPT),
    }),
    grant: datagram({ ...granted, type: grant, fragments, words: [cookie, 64n, 0n, 0n] }),
    data: datagram(
      {
        ...granted,
        type: data,
        deadlineMs: 1999,
        fragment: 1,
        words: [cookie, hashOf(key, last), ...sampling],
      },
      last,
    ),
    ack: datagram({ ...who, route: 3, type: ack, words: [cookie, 1n, 5n, 64n] }),
    tokens: datagram(
      { ...who, route: 3, type: tokensType, words: [cookie, hashOf(key, tokens), 0n, 0n] },
      tokens,
    ),
    end: datagram({
      ...who,
      route: 3,
      type: end,
      code: MESSAGE_CODES.length,
      words: [cookie, 1n, ...usage],
    }),
  }
}
