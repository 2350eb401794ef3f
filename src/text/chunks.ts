// Owns the memory of stretches of text that were encoded before: a word with what clings to it,
// cut where every word pattern cuts too. What is known needs no regular expression and no merges.

import { randomFillSync } from 'node:crypto'
import {
  ARENA_AT,
  ARENA_WORDS,
  makeScanner,
  SAID,
  SEED_AT,
  SLOT_BYTES,
  SLOTS,
  STRETCH_MAX,
  TABLE_AT,
  TEXT_AT,
  TEXT_BYTES,
  TOKENS_AT,
} from './chunks-wasm.ts'
import type { TokenBuffer, TokenSink } from './words.ts'

/** So many are remembered: half of the slots stay free. */
const STRETCHES = SLOTS / 2
/** A slot has so many bits for a token, or for a place in the arena. */
const PLACES = 1 << 18

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
 * @param utf8 a text's, with 0 behind the last
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

/** Remembers up to 65,536 stretches; when there is no more room it begins anew. 3.3 MB. */
export class ChunkCache {
  readonly #encode: (stretch: string, out: TokenSink) => void
  readonly #scanner = makeScanner()
  readonly #words = new Int32Array(this.#scanner.memory.buffer)
  readonly #bytes = Buffer.from(this.#scanner.memory.buffer)
  #count = 0
  #arenaUsed = 0

  /** @param encode makes tokens of a stretch that is not known, whatever is around it */
  constructor(encode: (stretch: string, out: TokenSink) => void) {
    this.#encode = encode
    // So that nobody can choose texts that meet in one slot.
    randomFillSync(this.#bytes, SEED_AT, 8)
  }

  /** Appends a well-formed text's tokens. */
  encode(text: string, out: TokenBuffer): void {
    // A unit of 16 bits becomes 3 bytes at most.
    if (3 * text.length <= TEXT_BYTES) {
      this.#encodeBlock(this.#bytes.write(text, TEXT_AT, 'utf8'), out)
      return
    }
    const utf8 = Buffer.from(`${text}\0`)
    const end = utf8.length - 1
    for (let from = 0; from < end;) {
      const to = blockEnd(utf8, from, end)
      if (to - from > TEXT_BYTES) this.#encode(utf8.toString('utf8', from, to), out)
      else this.#encodeBlock(utf8.copy(this.#bytes, TEXT_AT, from, to), out)
      from = to
    }
  }

  /** What lies in the scanner's memory, so many bytes. */
  #encodeBlock(count: number, out: TokenBuffer): void {
    const end = TEXT_AT + count
    this.#bytes.fill(0, end, end + 16)
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
    // In a crowd.
    if (slot === 0) return
    const farBytes = length > 8 ? (length - 1) & ~7 : 0
    const isNear = length <= 8 && tokens.length === 1
    const needed = isNear ? 0 : (farBytes >> 2) + tokens.length
    if (this.#count === STRETCHES || this.#arenaUsed + needed > ARENA_WORDS) {
      this.#forget()
      return
    }
    const place = isNear ? tokens[0]! : this.#arenaUsed
    if (place >= PLACES) return
    const bytes = this.#bytes
    const slotAt = slot * 4
    words[slot] = words[SAID.hash >> 2]!
    bytes.fill(0, slotAt + 8, slotAt + 16)
    bytes.copy(bytes, slotAt + 8, from, from + Math.min(8, length))
    words[slot + 1] = (place << 14) | (tokens.length << 7) | length
    this.#count++
    if (isNear) return
    const far = ARENA_AT + this.#arenaUsed * 4
    bytes.fill(0, far, far + farBytes)
    bytes.copy(bytes, far, from + 8, from + length)
    words.set(tokens, (far + farBytes) >> 2)
    this.#arenaUsed += needed
  }

  #forget(): void {
    this.#bytes.fill(0, TABLE_AT, TABLE_AT + SLOTS * SLOT_BYTES)
    this.#count = this.#arenaUsed = 0
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
