// Owns the memory of stretches of text that were encoded before: a word with what clings to it,
// cut where every word pattern cuts too. What is known needs no regular expression and no merges.

import { randomInt } from 'node:crypto'

/** Longer stretches are rarely seen twice. */
const UNITS_MAX = 64
/** A generation: so many stretches, units of text and tokens; 1.6 MB. */
const STRETCHES = 1 << 15
const UNITS = 1 << 18
const TOKENS = 1 << 17
/** Slots are looked at no further than this, so that chosen text cannot make a search long. */
const PROBES = 16
/** Scratch memory kept between texts, in units: one huge text must not hold memory for good. */
const SCRATCH_KEPT = 1 << 16

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

/** Slots of 4 cells: hash, where its units begin, how many; where its tokens begin (and count). */
class Generation {
  readonly slots = new Int32Array(STRETCHES * 2 * 4)
  readonly units = new Uint16Array(UNITS)
  readonly tokens = new Int32Array(TOKENS)
  count = 0
  unitsUsed = 0
  tokensUsed = 0

  clear(): void {
    this.slots.fill(0)
    this.count = this.unitsUsed = this.tokensUsed = 0
  }

  /** Where the stretch's slot is, or minus one less than where it could be; 1 if nowhere. */
  find(text: Uint16Array, from: number, length: number, hash: number): number {
    const { slots, units } = this
    const mask = slots.length - 1
    let at = (hash << 2) & mask
    for (let probe = 0; probe < PROBES; probe++) {
      const known = slots[at + 2]!
      if (known === 0) return -1 - at
      if (known === length && slots[at] === hash) {
        const begin = slots[at + 1]!
        let i = 0
        while (i < length && units[begin + i] === text[from + i]) i++
        if (i === length) return at
      }
      at = (at + 4) & mask
    }
    return 1
  }

  /** False if there is no room. */
  add(
    slot: number,
    text: Uint16Array,
    from: number,
    length: number,
    hash: number,
    tokens: ArrayLike<number>,
  ): boolean {
    const { slots } = this
    const full =
      this.count >= STRETCHES ||
      this.unitsUsed + length > UNITS ||
      this.tokensUsed + tokens.length + 1 > TOKENS
    if (full) return false
    slots[slot] = hash
    slots[slot + 1] = this.unitsUsed
    slots[slot + 2] = length
    slots[slot + 3] = this.tokensUsed
    for (let i = 0; i < length; i++) this.units[this.unitsUsed++] = text[from + i]!
    this.tokens[this.tokensUsed++] = tokens.length
    for (let i = 0; i < tokens.length; i++) this.tokens[this.tokensUsed++] = tokens[i]!
    this.count++
    return true
  }
}

/** When the young generation is full it becomes the old one, whose stretches are forgotten. */
export class ChunkCache {
  readonly #encode: (stretch: string, out: number[]) => void
  /** So that nobody can choose texts that meet in one slot. */
  readonly #seed = randomInt(2 ** 32) | 0
  #young = new Generation()
  #old = new Generation()
  #bytes = Buffer.alloc(2 * 4096)
  #units = new Uint16Array(this.#bytes.buffer, this.#bytes.byteOffset, 4096)

  /** @param encode what a stretch that is not known becomes; it must not depend on what is around */
  constructor(encode: (stretch: string, out: number[]) => void) {
    this.#encode = encode
  }

  /** Appends a text's tokens. */
  encode(text: string, out: number[]): void {
    const end = text.length
    // One more, so that a cut may look behind the last.
    if (this.#units.length <= end) this.#reserve(Math.max(end + 1, 2 * this.#units.length))
    this.#bytes.write(text, 'utf16le')
    const units = this.#units
    units[end] = 0
    const seed = this.#seed
    let from = 0
    while (from < end) {
      let at = from
      let hash = seed
      do {
        hash = Math.imul(hash ^ units[at]!, 0x9e3779b1)
        hash ^= hash >>> 15
        at++
      } while (at < end && !(mayCut(units, at) && isWordCut(units, at)))
      const length = at - from
      if (length > UNITS_MAX) this.#encode(text.slice(from, at), out)
      else this.#append(text, from, length, hash, out)
      from = at
    }
    if (units.length > SCRATCH_KEPT) this.#reserve(4096)
  }

  #append(text: string, from: number, length: number, hash: number, out: number[]): void {
    const units = this.#units
    const slot = this.#young.find(units, from, length, hash)
    if (slot >= 0 && slot !== 1) return copy(this.#young, slot, out)
    const before = this.#old.find(units, from, length, hash)
    const begin = out.length
    if (before >= 0 && before !== 1) copy(this.#old, before, out)
    else this.#encode(text.slice(from, from + length), out)
    if (slot === 1) return
    const tokens = out.slice(begin)
    if (this.#young.add(-1 - slot, units, from, length, hash, tokens)) return
    const spare = this.#old
    this.#old = this.#young
    this.#young = spare
    spare.clear()
    spare.add(-1 - spare.find(units, from, length, hash), units, from, length, hash, tokens)
  }

  #reserve(units: number): void {
    this.#bytes = Buffer.allocUnsafeSlow(2 * units)
    this.#units = new Uint16Array(this.#bytes.buffer, this.#bytes.byteOffset, units)
  }
}

/** Says no to nearly all of those that are no cut. */
function mayCut(units: Uint16Array, at: number): boolean {
  return units[at] === SPACE || units[at - 1] === LINE_END
}

function copy({ slots, tokens }: Generation, slot: number, out: number[]): void {
  const at = slots[slot + 3]!
  const end = at + 1 + tokens[at]!
  for (let i = at + 1; i < end; i++) out.push(tokens[i]!)
}
