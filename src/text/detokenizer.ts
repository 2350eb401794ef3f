// Owns turning tokens' bytes to text as they arrive: whole characters only, and the same text
// however the bytes were split.

import type { Detokenizer } from './tokenizer.ts'

const decoder = new TextDecoder('utf-8', { ignoreBOM: true })
const SPACE = 0x20

/** Text of bytes; what is not UTF-8 becomes U+FFFD, one for each maximal subpart (Unicode 3.9). */
export function decodeUtf8(bytes: Uint8Array): string {
  return decoder.decode(bytes)
}

export class StreamingDetokenizer implements Detokenizer {
  readonly #bytesOf: (token: number) => Uint8Array
  /** The text's first space is the one that encoding put there. */
  #stripSpace: boolean
  #held = new Uint8Array(0)

  constructor(bytesOf: (token: number) => Uint8Array, stripSpace: boolean) {
    this.#bytesOf = bytesOf
    this.#stripSpace = stripSpace
  }

  push(token: number): string {
    let bytes = this.#bytesOf(token)
    if (bytes.length === 0) return ''
    if (this.#stripSpace) {
      this.#stripSpace = false
      if (bytes[0] === SPACE) bytes = bytes.subarray(1)
    }
    const all = this.#held.length === 0 ? bytes : Buffer.concat([this.#held, bytes])
    const whole = all.length - unfinishedBytes(all)
    this.#held = all.slice(whole)
    return decodeUtf8(all.subarray(0, whole))
  }

  end(): string {
    const rest = decodeUtf8(this.#held)
    this.#held = new Uint8Array(0)
    return rest
  }
}

/**
 * How many bytes at the end begin a character that more bytes could finish: 0 to 3. Bytes that
 * can become nothing are not counted, so that they show as U+FFFD at once.
 */
export function unfinishedBytes(bytes: Uint8Array): number {
  const size = bytes.length
  for (let back = 1; back <= Math.min(3, size); back++) {
    const byte = bytes[size - back]!
    if (byte >= 0x80 && byte < 0xc0) continue
    return back < sequenceLength(byte) && secondFits(byte, bytes[size - back + 1]) ? back : 0
  }
  return 0
}

/** Bytes of the character that a lead byte opens; 1 for a byte that opens none. */
function sequenceLength(lead: number): number {
  if (lead >= 0xc2 && lead <= 0xdf) return 2
  if (lead >= 0xe0 && lead <= 0xef) return 3
  return lead >= 0xf0 && lead <= 0xf4 ? 4 : 1
}

/** The second byte's range is narrower after these leads: no overlong forms, no surrogates. */
function secondFits(lead: number, second: number | undefined): boolean {
  if (second === undefined) return true
  if (lead === 0xe0) return second >= 0xa0
  if (lead === 0xed) return second < 0xa0
  if (lead === 0xf0) return second >= 0x90
  return lead !== 0xf4 || second < 0x90
}
