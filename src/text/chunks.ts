// Owns the memory of stretches of text that were encoded before: a word with what clings to it,
// cut where every word pattern cuts too. What is known needs no regular expression and no merges.

import { randomInt } from 'node:crypto'
import type { TokenSink } from './words.ts'

/** Longer stretches are rarely seen twice. */
const UNITS_MAX = 64
/** A generation: so many stretches, and half-words of text and tokens; 1.5 MB. */
const STRETCHES = 1 << 15
const ARENA = 1 << 19
/** Slots are looked at no further than this, so that chosen text cannot make a search long. */
const PROBES = 16
/** Scratch memory kept between texts, in units: one huge text must not hold memory for good. */
const SCRATCH_KEPT = 1 << 16

/** More than any place in an arena or a table of slots. */
const NONE = 1 << 30
const MIX = 0x9e3779b1

const LINE_END = 10
const SPACE = 32
const SLASH = 47
const DELETE = 127

/**
 * Whether text may be cut before unit `at`. GPT's words and all that came after them begin at a
 * space that a visible ASCII character follows, and after a line end, whatever stands around it;
 * but what follows more than one space only if it is a letter: where numbers and punctuation are
 * cut out first, all the spaces before them stay together. A slash may cling to line ends.
 *
 * @param units a text's, with 0 behind the last
 */
export function isWordCut(units: Uint16Array, at: number): boolean {
  const before = units[at - 1]!
  if (units[at] === SPACE) {
    const next = units[at + 1]!
    if (isVisible(before)) return isVisible(next)
    return (before === SPACE || before === LINE_END) && isLetter(next)
  }
  if (before !== LINE_END || units[at] === SLASH) return false
  return at > 1 && isVisible(units[at]!) && isVisible(units[at - 2]!)
}

function isVisible(unit: number): boolean {
  return unit > SPACE && unit < DELETE
}

function isLetter(unit: number): boolean {
  const lower = unit | 32
  return lower > 96 && lower < 123
}

/**
 * A slot is two cells: a stretch's hash, and where in the arena it lies (0 is nowhere): how many
 * units and tokens, the units, the tokens as two halves each. So a look takes two cache lines.
 */
class Generation {
  readonly slots = new Int32Array(STRETCHES * 2 * 2)
  readonly arena = new Uint16Array(ARENA)
  count = 0
  used = 1

  clear(): void {
    this.slots.fill(0)
    this.count = 0
    this.used = 1
  }

  /** Where in the arena the stretch lies; else where a slot is free, less NONE; NONE if nowhere. */
  find(text: Uint16Array, from: number, length: number, hash: number): number {
    const { slots, arena } = this
    const mask = slots.length - 1
    let slot = (hash << 1) & mask
    for (let probe = 0; probe < PROBES; probe++) {
      const at = slots[slot + 1]!
      if (at === 0) return slot - NONE
      if (slots[slot] === hash && arena[at] === length) {
        let i = 0
        while (i < length && arena[at + 2 + i] === text[from + i]) i++
        if (i === length) return at
      }
      slot = (slot + 2) & mask
    }
    return NONE
  }

  copy(at: number, out: TokenSink): void {
    const { arena } = this
    const begin = at + 2 + arena[at]!
    const end = begin + 2 * arena[at + 1]!
    for (let i = begin; i < end; i += 2) out.push(arena[i]! | (arena[i + 1]! << 16))
  }

  /** False if there is no room. */
  add(
    slot: number,
    text: Uint16Array,
    from: number,
    length: number,
    hash: number,
    tokens: readonly number[],
  ): boolean {
    const { slots, arena } = this
    const end = this.used + 2 + length + 2 * tokens.length
    if (this.count >= STRETCHES || end > ARENA) return false
    slots[slot] = hash
    slots[slot + 1] = this.used
    arena[this.used++] = length
    arena[this.used++] = tokens.length
    for (let i = 0; i < length; i++) arena[this.used++] = text[from + i]!
    for (const token of tokens) {
      arena[this.used++] = token
      arena[this.used++] = token >>> 16
    }
    this.count++
    return true
  }
}

/** When the young generation is full it becomes the old one, whose stretches are forgotten. */
export class ChunkCache {
  readonly #encode: (stretch: string, out: TokenSink) => void
  /** So that nobody can choose texts that meet in one slot. */
  readonly #seed = randomInt(2 ** 32) | 0
  #young = new Generation()
  #old = new Generation()
  #bytes = Buffer.alloc(2 * 4096)
  #units = new Uint16Array(this.#bytes.buffer, this.#bytes.byteOffset, 4096)

  /** @param encode what a stretch that is not known becomes; it must not depend on what is around */
  constructor(encode: (stretch: string, out: TokenSink) => void) {
    this.#encode = encode
  }

  /** Appends a text's tokens. */
  encode(text: string, out: TokenSink): void {
    const end = text.length
    // One more, so that a cut may look behind the last.
    if (this.#units.length <= end) this.#reserve(Math.max(end + 1, 2 * this.#units.length))
    this.#bytes.write(text, 'utf16le')
    const units = this.#units
    units[end] = 0
    const seed = this.#seed
    let from = 0
    while (from < end) {
      let unit = units[from]!
      let hash = Math.imul(seed ^ unit, MIX)
      let at = from + 1
      for (; at < end; at++) {
        const next = units[at]!
        if ((next === SPACE || unit === LINE_END) && isWordCut(units, at)) break
        hash = Math.imul(hash ^ next, MIX)
        unit = next
      }
      // The low bits choose the slot; multiplying carries nothing down to them.
      hash ^= hash >>> 15
      const known = at - from > UNITS_MAX ? NONE : this.#young.find(units, from, at - from, hash)
      if (known > 0 && known < NONE) this.#young.copy(known, out)
      else this.#look(text, from, at, hash, out)
      from = at
    }
    if (units.length > SCRATCH_KEPT) this.#reserve(4096)
  }

  /** A stretch that the young generation does not know: the old one does, or nobody. */
  #look(text: string, from: number, to: number, hash: number, out: TokenSink): void {
    const units = this.#units
    const length = to - from
    const tokens: number[] = []
    if (length > UNITS_MAX) this.#encode(text.slice(from, to), tokens)
    else {
      const known = this.#old.find(units, from, length, hash)
      if (known > 0 && known < NONE) this.#old.copy(known, tokens)
      else this.#encode(text.slice(from, to), tokens)
      this.#keep(from, length, hash, tokens)
    }
    for (const token of tokens) out.push(token)
  }

  #keep(from: number, length: number, hash: number, tokens: readonly number[]): void {
    const units = this.#units
    const slot = this.#young.find(units, from, length, hash)
    // Known by now, or in a crowd.
    if (slot > 0) return
    if (this.#young.add(slot + NONE, units, from, length, hash, tokens)) return
    const spare = this.#old
    this.#old = this.#young
    this.#young = spare
    spare.clear()
    spare.add(spare.find(units, from, length, hash) + NONE, units, from, length, hash, tokens)
  }

  #reserve(units: number): void {
    this.#bytes = Buffer.allocUnsafeSlow(2 * units)
    this.#units = new Uint16Array(this.#bytes.buffer, this.#bytes.byteOffset, units)
  }
}
