// Owns what makes repeated words cheap: where a piece may be cut without changing its tokens, and
// a bounded memory of words already encoded.

/** Where tokens go: an array, or what grows without copying boxed numbers. */
export interface TokenSink {
  push(token: number): unknown
}

/** Tokens of a text, in memory that the next text uses again. */
export class TokenBuffer implements TokenSink {
  #tokens = new Int32Array(1024)
  count = 0

  push(token: number): void {
    if (this.count === this.#tokens.length) this.#reserve(2 * this.count)
    this.#tokens[this.count++] = token
  }

  /** Words [from, to) of an array. */
  append(words: Int32Array, from: number, to: number): void {
    const count = to - from
    if (this.count + count > this.#tokens.length) this.#reserve(2 * (this.count + count))
    // For the few tokens between two unknown words a view costs more than it saves.
    if (count > VIEWED) {
      this.#tokens.set(words.subarray(from, to), this.count)
      this.count += count
      return
    }
    for (let i = from; i < to; i++) this.#tokens[this.count++] = words[i]!
  }

  at(index: number): number | undefined {
    return index < this.count ? this.#tokens[index] : undefined
  }

  remove(index: number): void {
    this.#tokens.copyWithin(index, index + 1, this.count--)
  }

  /** Empties it. */
  begin(): void {
    this.count = 0
    if (this.#tokens.length > TOKENS_KEPT) this.#tokens = new Int32Array(1024)
  }

  /** All of them, as an array of their own; empty afterwards. */
  take(): Int32Array {
    const all = this.#tokens.slice(0, this.count)
    this.begin()
    return all
  }

  /** All of them, until something else is done here. */
  view(): Int32Array {
    return this.#tokens.subarray(0, this.count)
  }

  #reserve(count: number): void {
    const before = this.#tokens
    this.#tokens = new Int32Array(count)
    this.#tokens.set(before)
  }
}

/** From so many on, tokens are copied at once. */
const VIEWED = 64
/** One huge text must not hold memory for good. */
const TOKENS_KEPT = 1 << 16

/** Turns one piece of text to tokens; pieces never merge with each other. */
export interface PieceModel {
  encode(piece: string, out: TokenSink): void
}

/** Words longer than this are rarely seen twice. */
const WORD_UNITS_MAX = 48

/** Two generations of this many words are kept: some 10 MB at most. */
const GENERATION_WORDS = 16384

/** Remembers the tokens of recent words: when the young generation is full it becomes the old. */
export class WordCache {
  #young = new Map<string, readonly number[]>()
  #old = new Map<string, readonly number[]>()

  get(word: string): readonly number[] | undefined {
    const young = this.#young.get(word)
    if (young !== undefined) return young
    const old = this.#old.get(word)
    if (old !== undefined) this.set(word, old)
    return old
  }

  set(word: string, tokens: readonly number[]): void {
    if (word.length > WORD_UNITS_MAX) return
    if (this.#young.size >= GENERATION_WORDS) {
      this.#old = this.#young
      this.#young = new Map()
    }
    this.#young.set(word, tokens)
  }

  /** Appends a word's tokens, from memory or by `encode`. */
  encode(word: string, encode: (word: string, out: TokenSink) => void, out: TokenSink): void {
    if (word.length > WORD_UNITS_MAX) return encode(word, out)
    let tokens = this.get(word)
    if (tokens === undefined) {
      const fresh: number[] = []
      encode(word, fresh)
      // A substring would keep the whole text it was cut from alive.
      this.set(detached(word), fresh)
      tokens = fresh
    }
    for (let i = 0; i < tokens.length; i++) out.push(tokens[i]!)
  }
}

function detached(word: string): string {
  return Buffer.from(word, 'utf16le').toString('utf16le')
}

/** The space of SentencePiece vocabularies, U+2581. */
export const META_SPACE = '\u2581'

/**
 * Cuts text before each U+2581 where no vocabulary entry could reach across: there the words'
 * tokens are the text's tokens, so a whole text need not be merged at once.
 *
 * @param entries every entry a merge may produce
 */
export class WordCutter {
  /** Characters (code units) that some entry has before an inner U+2581. */
  readonly #reaching = new Set<string>([META_SPACE])

  constructor(entries: Iterable<string>) {
    for (const entry of entries) {
      let at = entry.indexOf(META_SPACE, 1)
      for (; at > 0; at = entry.indexOf(META_SPACE, at + 1)) this.#reaching.add(entry[at - 1]!)
    }
  }

  cut(text: string, word: (word: string) => void): void {
    let from = 0
    let at = text.indexOf(META_SPACE, 1)
    for (; at > 0; at = text.indexOf(META_SPACE, at + 1)) {
      if (this.#reaching.has(text[at - 1]!)) continue
      word(text.slice(from, at))
      from = at
    }
    if (from < text.length) word(text.slice(from))
  }
}
