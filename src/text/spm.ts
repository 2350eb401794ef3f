// Owns SentencePiece's BPE: pieces carry scores instead of ranked merges, any two neighbours whose
// text together is a piece may merge, the best score first (Kudo & Richardson 2018).

import { byteEntry } from './bpe.ts'
import { Merger, type PairMerge, type PairSource, PairTable, SCRATCH_KEPT } from './merger.ts'
import { type PieceModel, WordCache, WordCutter, type TokenSink } from './words.ts'

export interface SpmOptions {
  /** Pieces that merging may reach: normal and unused ones. */
  pieces: ReadonlyMap<string, number>
  /** Log probability by token id. */
  scores: ArrayLike<number>
  vocabSize: number
  /** Ids among `pieces` that merging may pass through but not end at. */
  unused: ReadonlySet<number>
  /** All token texts, to find `<0x00>` to `<0xFF>`. */
  byteTokens: readonly (number | undefined)[]
  /** Stands for runs of characters that are neither pieces nor have byte tokens. */
  unknown: number | undefined
}

/** Remembered pairs; beyond it the table starts anew (32 MiB). */
const PAIRS_MAX = 1 << 20
const APART = -1

/** Takes pieces whose spaces are U+2581 already. */
export class Spm implements PieceModel, PairSource {
  readonly #options: SpmOptions
  readonly #merger = new Merger(this)
  readonly #cache = new WordCache()
  readonly #cutter: WordCutter
  /** Distinct scores, ascending: a pair's rank is its score's place from the end. */
  readonly #scores: Float64Array
  readonly #texts: string[] = []
  #pairs = new PairTable(1024)
  #symbols = new Int32Array(1024)
  /** How an unused piece came about: resolved when merging ends at one. */
  readonly #halves = new Map<number, readonly [number, number]>()

  constructor(options: SpmOptions) {
    this.#options = options
    this.#cutter = new WordCutter(options.pieces.keys())
    const scores: number[] = []
    for (const [text, id] of options.pieces) {
      this.#texts[id] = text
      scores.push(options.scores[id] ?? 0)
    }
    this.#scores = distinctAscending(scores)
  }

  encode(piece: string, out: TokenSink): void {
    this.#cutter.cut(piece, (word) => this.#cache.encode(word, this.#encodeWord, out))
  }

  /** A pair's fate is looked up by its text once, then remembered by its ids. */
  lookup(left: number, right: number, out: PairMerge): boolean {
    const slot = this.#pairs.find(left, right)
    if (slot >= 0) {
      out.merged = this.#pairs.merged(slot)
      out.rank = this.#pairs.rank(slot)
    } else {
      const id = this.#options.pieces.get(this.#text(left) + this.#text(right))
      out.merged = id ?? APART
      out.rank = id === undefined ? 0 : this.#rank(this.#options.scores[id] ?? 0)
      if (this.#pairs.count >= PAIRS_MAX) this.#pairs = new PairTable(1024)
      this.#pairs.set(left, right, out.rank, out.merged)
    }
    if (out.merged === APART) return false
    if (this.#options.unused.has(out.merged)) this.#halves.set(out.merged, [left, right])
    return true
  }

  readonly #encodeWord = (word: string, out: TokenSink): void => {
    const { pieces, vocabSize } = this.#options
    if (this.#symbols.length < word.length) this.#symbols = new Int32Array(word.length)
    let count = 0
    for (const char of word) {
      // A character that is no piece gets an id past the vocabulary, to be told apart by.
      this.#symbols[count++] = pieces.get(char) ?? vocabSize + char.codePointAt(0)!
    }
    this.#halves.clear()
    const left = this.#merger.merge(this.#symbols, count)
    let unknownBefore = false
    for (let i = 0; i < left; i++) {
      const symbol = this.#symbols[i]!
      if (symbol < vocabSize) {
        this.#resegment(symbol, out)
        unknownBefore = false
      } else {
        unknownBefore = this.#fallback(symbol, unknownBefore, out)
      }
    }
    if (this.#symbols.length > SCRATCH_KEPT) this.#symbols = new Int32Array(SCRATCH_KEPT)
  }

  #resegment(symbol: number, out: TokenSink): void {
    const halves = this.#options.unused.has(symbol) ? this.#halves.get(symbol) : undefined
    if (halves === undefined) {
      if (symbol < this.#options.vocabSize) out.push(symbol)
      else this.#fallback(symbol, false, out)
      return
    }
    this.#resegment(halves[0], out)
    this.#resegment(halves[1], out)
  }

  /** Writes a character's bytes, or the unknown token once a run. Says whether it was unknown. */
  #fallback(symbol: number, unknownBefore: boolean, out: TokenSink): boolean {
    const { byteTokens, unknown } = this.#options
    const bytes = Buffer.from(this.#text(symbol), 'utf8')
    if (bytes.every((byte) => byteTokens[byte] !== undefined)) {
      for (const byte of bytes) out.push(byteTokens[byte]!)
      return false
    }
    if (unknown !== undefined && !unknownBefore) out.push(unknown)
    return true
  }

  #text(symbol: number): string {
    const { vocabSize } = this.#options
    return symbol < vocabSize ? this.#texts[symbol]! : String.fromCodePoint(symbol - vocabSize)
  }

  #rank(score: number): number {
    let low = 0
    let high = this.#scores.length - 1
    while (low < high) {
      const middle = (low + high) >> 1
      if (this.#scores[middle]! < score) low = middle + 1
      else high = middle
    }
    return this.#scores.length - 1 - low
  }
}

function distinctAscending(values: number[]): Float64Array {
  const sorted = Float64Array.from(values).sort()
  return sorted.filter((value, i) => i === 0 || value !== sorted[i - 1])
}

/** The tokens of the 256 bytes in a SentencePiece vocabulary. */
export function byteTokensOf(ids: ReadonlyMap<string, number>): (number | undefined)[] {
  return Array.from({ length: 256 }, (_, byte) => ids.get(byteEntry(byte)))
}
