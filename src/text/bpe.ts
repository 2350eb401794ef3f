// Owns byte-pair encoding by ranked merges, over bytes (GPT-2's alphabet) or over characters with
// byte fallback, as Hugging Face's tokenizers define it (Sennrich et al. 2016).

import { BYTE_TO_CHAR, writeUtf8 } from './byte-alphabet.ts'
import { Merger, type PairMerge, type PairSource, type PairTable, SCRATCH_KEPT } from './merger.ts'
import { META_SPACE, type PieceModel, WordCache, WordCutter, type TokenSink } from './words.ts'

export interface BpeOptions {
  /** Entries a piece may consist of: no special tokens, unless the model's own vocabulary does. */
  ids: ReadonlyMap<string, number>
  merges: PairTable
  /** bytes: entries are spelled in the byte alphabet, pieces are plain text; or both plain. */
  alphabet: 'bytes' | 'characters'
  /** A character without an entry becomes its UTF-8 bytes' tokens, `<0x00>` to `<0xFF>`. */
  byteFallback: boolean
  /** What else it becomes; undefined drops it, which is what models without one do. */
  unknown: number | undefined
  /** Neighbouring unknown characters become one token. */
  fuseUnknown: boolean
  /** A piece that is an entry is one token even if no merges lead there (`ignore_merges`). */
  wholePieces: boolean
}

export class Bpe implements PieceModel, PairSource {
  readonly #options: BpeOptions
  readonly #merger = new Merger(this)
  readonly #cache = new WordCache()
  readonly #cutter: WordCutter | undefined
  /** Token of each byte in the byte alphabet, -1 without one. */
  readonly #byteTokens: Int32Array
  #bytes = new Uint8Array(1024)
  #symbols = new Int32Array(1024)

  constructor(options: BpeOptions) {
    this.#options = options
    this.#byteTokens = Int32Array.from(BYTE_TO_CHAR, (char) => options.ids.get(char) ?? -1)
    // Whole-piece lookup sees the piece, so it must not be cut.
    const cuts =
      options.alphabet === 'characters' && !options.wholePieces && options.ids.has(META_SPACE)
    if (cuts) this.#cutter = new WordCutter(options.ids.keys())
  }

  encode(piece: string, out: TokenSink): void {
    if (this.#cutter === undefined) this.#cache.encode(piece, this.#encodeWord, out)
    else this.#cutter.cut(piece, (word) => this.#cache.encode(word, this.#encodeWord, out))
  }

  lookup(left: number, right: number, out: PairMerge): boolean {
    const merges = this.#options.merges
    const slot = merges.find(left, right)
    if (slot < 0) return false
    out.rank = merges.rank(slot)
    out.merged = merges.merged(slot)
    return true
  }

  readonly #encodeWord = (word: string, out: TokenSink): void => {
    const { alphabet, wholePieces } = this.#options
    if (this.#symbols.length < word.length * 3 + 1) this.#reserve(word.length * 3 + 1)
    if (wholePieces) {
      const whole = this.#entry(word)
      if (whole !== undefined) {
        out.push(whole)
        return
      }
    }
    const count = alphabet === 'bytes' ? this.#byteSymbols(word) : this.#characterSymbols(word)
    const left = this.#merger.merge(this.#symbols, count)
    for (let i = 0; i < left; i++) out.push(this.#symbols[i]!)
    if (this.#symbols.length > SCRATCH_KEPT) this.#reserve(SCRATCH_KEPT)
  }

  #reserve(size: number): void {
    this.#bytes = new Uint8Array(size)
    this.#symbols = new Int32Array(size)
  }

  #entry(word: string): number | undefined {
    if (this.#options.alphabet === 'characters') return this.#options.ids.get(word)
    let spelled = ''
    const count = writeUtf8(word, this.#bytes)
    for (let i = 0; i < count; i++) spelled += BYTE_TO_CHAR[this.#bytes[i]!]!
    return this.#options.ids.get(spelled)
  }

  #byteSymbols(word: string): number {
    const count = writeUtf8(word, this.#bytes)
    const symbols = this.#symbols
    let complete = true
    for (let i = 0; i < count; i++) {
      const token = this.#byteTokens[this.#bytes[i]!]!
      symbols[i] = token
      if (token < 0) complete = false
    }
    if (complete) return count
    const chars = Array.from(this.#bytes.subarray(0, count), (byte) => BYTE_TO_CHAR[byte]!)
    return this.#resolve(chars)
  }

  #characterSymbols(word: string): number {
    return this.#resolve(word)
  }

  #resolve(characters: Iterable<string>): number {
    const { ids, byteFallback, unknown, fuseUnknown } = this.#options
    const symbols = this.#symbols
    let count = 0
    let unknownPending = false
    for (const char of characters) {
      const id = ids.get(char)
      if (id !== undefined) {
        if (unknownPending) symbols[count++] = unknown!
        unknownPending = false
        symbols[count++] = id
        continue
      }
      const bytes = byteFallback ? this.#fallback(char) : undefined
      if (bytes !== undefined) {
        for (const token of bytes) symbols[count++] = token
        continue
      }
      if (unknown === undefined) continue
      if (unknownPending && !fuseUnknown) symbols[count++] = unknown
      unknownPending = true
    }
    if (unknownPending) symbols[count++] = unknown!
    return count
  }

  #fallback(char: string): number[] | undefined {
    const tokens: number[] = []
    for (const byte of Buffer.from(char, 'utf8')) {
      const token = this.#options.ids.get(byteEntry(byte))
      if (token === undefined) return undefined
      tokens.push(token)
    }
    return tokens
  }
}

/** How SentencePiece vocabularies write a byte: `<0x0A>`. */
export function byteEntry(byte: number): string {
  return `<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`
}

/** The byte an entry such as `<0x0A>` stands for. */
export function entryByte(entry: string): number | undefined {
  return /^<0x[0-9A-F]{2}>$/.test(entry) ? Number.parseInt(entry.slice(3, 5), 16) : undefined
}
