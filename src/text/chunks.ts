// Owns the memory of stretches of text that were encoded before: a word with what clings to it,
// cut where every word pattern cuts too. What is known needs no regular expression and no merges.

import { randomFillSync } from 'node:crypto'
import {
  ARENA_AT,
  ENTRY,
  KEY_BYTES,
  makeScanner,
  PLACE_BITS,
  SAID,
  SEED_AT,
  SLOTS,
  STRETCH_MAX,
  TABLE_AT,
  TEXT_AT,
  TEXT_BYTES,
  TOKENS_AT,
  UNIT_BITS,
} from './chunks-wasm.ts'
import type { TokenBuffer, TokenSink } from './words.ts'

/** So many are remembered: half of the slots stay free. */
const STRETCHES = SLOTS / 2

/** An empty slot says 0: what lies there has no length, so that it is never what is looked for. */
const FIRST_PLACE = (ENTRY.tokens >> UNIT_BITS) + 1

const LINE_END = 10
const SPACE = 32
const SLASH = 47
const DELETE = 127

/**
 * Whether text may be cut before byte `at`. GPT's words and all that came after them begin at a
 * space that a visible ASCII character follows, and after a line end, whatever stands around it;
 * but what follows more than one space only if it is a letter: where numbers and punctuation are
 * cut out first, all the spaces before them stay together. A slash may cling to line ends.
 * `scan` finds the same places.
 *
 * @param utf8 a whole text's
 */
export function isWordCut(utf8: Uint8Array, at: number): boolean {
  const before = utf8[at - 1]!
  if (utf8[at] === SPACE) {
    const next = utf8[at + 1]!
    if (isVisible(before)) return isVisible(next)
    return (before === SPACE || before === LINE_END) && isLetter(next)
  }
  if (before !== LINE_END || utf8[at] === SLASH) return false
  return at > 1 && isVisible(utf8[at]!) && isVisible(utf8[at - 2]!)
}

function isVisible(byte: number): boolean {
  return byte > SPACE && byte < DELETE
}

function isLetter(byte: number): boolean {
  const lower = byte | 32
  return lower > 96 && lower < 123
}

/** Remembers up to 65,536 stretches; when there is no more room it begins anew. 2.8 MB. */
export class ChunkCache {
  readonly #encode: (stretch: string, out: TokenSink) => void
  readonly #scanner = makeScanner()
  readonly #words = new Int32Array(this.#scanner.memory.buffer)
  readonly #bytes = Buffer.from(this.#scanner.memory.buffer)
  #count = 0
  /** In units. */
  #arenaUsed = FIRST_PLACE

  /** @param encode makes tokens of a stretch that is not known, whatever is around it */
  constructor(encode: (stretch: string, out: TokenSink) => void) {
    this.#encode = encode
    // So that nobody can choose texts that meet in one slot.
    randomFillSync(this.#bytes, SEED_AT, 8)
  }

  /** Appends a well-formed text's tokens. */
  encode(text: string, out: TokenBuffer): void {
    // A unit of 16 bits becomes 3 bytes at most.
    if (3 * text.length > TEXT_BYTES) this.encodeUtf8(Buffer.from(text), out)
    else this.#encodeBlock(this.#bytes.write(text, TEXT_AT, 'utf8'), out)
  }

  /** Appends the tokens of a text that is UTF-8. */
  encodeUtf8(utf8: Uint8Array, out: TokenBuffer): void {
    for (let from = 0; from < utf8.length;) {
      const to = blockEnd(utf8, from, utf8.length)
      const block = utf8.subarray(from, to)
      if (to - from > TEXT_BYTES) this.#encode(Buffer.from(block).toString(), out)
      else {
        this.#bytes.set(block, TEXT_AT)
        this.#encodeBlock(to - from, out)
      }
      from = to
    }
  }

  /** What lies in the scanner's memory, so many bytes. */
  #encodeBlock(count: number, out: TokenBuffer): void {
    const end = TEXT_AT + count
    this.#bytes[end] = 0
    let from = TEXT_AT
    for (;;) {
      from = this.#scanner.scan(from, end, TOKENS_AT)
      out.append(this.#words, TOKENS_AT >> 2, this.#words[SAID.tokens >> 2]! >> 2)
      if (from === end) return
      const to = this.#words[SAID.end >> 2]!
      const tokens: number[] = []
      this.#encode(this.#bytes.toString('utf8', from, to), tokens)
      for (const token of tokens) out.push(token)
      if (to - from <= STRETCH_MAX) this.#keep(from, to - from, tokens)
      from = to
    }
  }

  /** The stretch that `scan` has stopped at. */
  #keep(from: number, length: number, tokens: readonly number[]): void {
    const words = this.#words
    const slot = words[SAID.slot >> 2]! >> 2
    // In a crowd; or more than there is room for when a text is full of them.
    if (slot === 0 || tokens.length > length) return
    const restBytes = length > KEY_BYTES ? (length - KEY_BYTES + 7) & ~7 : 0
    const bytesUsed = ENTRY.tokens + 4 * tokens.length + restBytes
    const units = ((bytesUsed - 1) >> UNIT_BITS) + 1
    const place = this.#arenaUsed
    if (this.#count === STRETCHES || place + units > 1 << PLACE_BITS) {
      this.#forget()
      return
    }
    const bytes = this.#bytes
    const at = ARENA_AT + (place << UNIT_BITS)
    bytes.fill(0, at, at + (units << UNIT_BITS))
    bytes.copy(bytes, at, from, from + Math.min(KEY_BYTES, length))
    words[(at + ENTRY.sizes) >> 2] = (tokens.length << 7) | length
    words.set(tokens, (at + ENTRY.tokens) >> 2)
    const rest = at + ENTRY.tokens + 4 * tokens.length
    bytes.copy(bytes, rest, from + KEY_BYTES, from + Math.max(KEY_BYTES, length))
    words[slot] = (words[SAID.hash >> 2]! & (-1 << PLACE_BITS)) | place
    this.#count++
    this.#arenaUsed += units
  }

  #forget(): void {
    this.#bytes.fill(0, TABLE_AT, TABLE_AT + SLOTS * 4)
    this.#count = 0
    this.#arenaUsed = FIRST_PLACE
  }
}

/** A cut that is no further than a block is long, if there is one: else the next. */
function blockEnd(utf8: Uint8Array, from: number, end: number): number {
  if (end - from <= TEXT_BYTES) return end
  let to = from + TEXT_BYTES
  while (to > from && !isWordCut(utf8, to)) to--
  if (to > from) return to
  for (to = from + TEXT_BYTES; to < end && !isWordCut(utf8, to);) to++
  return to
}
