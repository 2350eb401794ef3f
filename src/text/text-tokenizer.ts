// Owns the way from text to tokens and back: added tokens out first, then normalize, cut into
// pieces, and let the model encode each. What differs between models are the parts.

import type { AddedTokenMatcher } from './added-tokens.ts'
import { ChunkCache } from './chunks.ts'
import { decodeUtf8, StreamingDetokenizer } from './detokenizer.ts'
import { asIs, type Normalizer } from './normalize.ts'
import type { PreTokenizer } from './pretokenize.ts'
import type { Detokenizer, Tokenizer } from './tokenizer.ts'
import { type PieceModel, TokenBuffer, type TokenSink } from './words.ts'

export interface TokenizerParts {
  /** Spelling by id; ids may have holes. */
  tokens: readonly (string | undefined)[]
  /** Ids whose text is no one's speech: hidden by `skipSpecial`, parsed only where allowed. */
  special: ReadonlySet<number>
  /** Tokens found in the text as given, and those found once it is normalized. */
  added: AddedTokenMatcher
  addedNormalized: AddedTokenMatcher | undefined
  normalize: Normalizer
  preTokenize: PreTokenizer
  model: PieceModel
  /** What addSpecial puts around a text. */
  prefix: readonly number[]
  suffix: readonly number[]
  bosToken: number | undefined
  eosTokens: readonly number[]
  /** The bytes of a token, from its spelling. */
  bytesOf: (token: number, spelling: string) => Uint8Array
  /** Encoding puts a space before a text; decoding takes it away. */
  stripsSpace: boolean
}

const NOTHING = new Uint8Array(0)

export class TextTokenizer implements Tokenizer {
  readonly vocabSize: number
  readonly bosToken: number | undefined
  readonly eosTokens: readonly number[]
  readonly #parts: TokenizerParts
  readonly #bytes: (Uint8Array | undefined)[] = []
  readonly #out = new TokenBuffer()
  /** Only if text may be cut where words begin. */
  readonly #chunks: ChunkCache | undefined
  /** Text without special tokens is its stretches, one after the other. */
  readonly #isPlain: boolean

  constructor(parts: TokenizerParts) {
    this.#parts = parts
    this.vocabSize = parts.tokens.length
    this.bosToken = parts.bosToken
    this.eosTokens = parts.eosTokens
    const { added, addedNormalized, normalize } = parts
    this.#isPlain = normalize === asIs && added.allSpecial && (addedNormalized?.allSpecial ?? true)
    if (parts.preTokenize.atWords !== 'cuts') return
    this.#chunks = new ChunkCache((stretch, out) => this.#encodePieces(stretch, false, out))
  }

  encode(text: string, options: { addSpecial: boolean; parseSpecial: boolean }): Int32Array {
    const { added, addedNormalized, normalize, prefix } = this.#parts
    const { addSpecial, parseSpecial } = options
    const out = this.#out
    out.begin()
    if (addSpecial) for (const token of prefix) out.push(token)
    let atStart = true
    const encodeText = (segment: string): void => {
      if (this.#chunks) this.#chunks.encode(segment, out)
      else this.#encodePieces(segment, atStart, out)
    }
    for (const segment of added.split(text.toWellFormed(), parseSpecial)) {
      if (typeof segment === 'number') {
        out.push(segment)
        atStart = false
        continue
      }
      const normalized = normalize(segment)
      for (const part of addedNormalized?.split(normalized, parseSpecial) ?? [normalized]) {
        if (typeof part === 'number') out.push(part)
        else if (part !== '') encodeText(part)
        atStart = false
      }
    }
    if (addSpecial) this.#end(out)
    return out.take()
  }

  encodeUtf8(utf8: Uint8Array, addSpecial: boolean): Int32Array | undefined {
    if (!this.#chunks || !this.#isPlain) return undefined
    const out = this.#out
    out.begin()
    if (addSpecial) for (const token of this.#parts.prefix) out.push(token)
    this.#chunks.encodeUtf8(utf8, out)
    if (addSpecial) this.#end(out)
    return out.view()
  }

  #encodePieces(text: string, atStart: boolean, out: TokenSink): void {
    const { preTokenize, model } = this.#parts
    for (const piece of preTokenize({ texts: [text], atStart }).texts) model.encode(piece, out)
  }

  #end(out: TokenBuffer): void {
    const { prefix, suffix, bosToken } = this.#parts
    const at = prefix.length
    // A rendered template often begins with the token that addSpecial adds.
    if (at > 0 && prefix[at - 1] === bosToken && out.at(at) === bosToken) out.remove(at)
    for (const token of suffix) out.push(token)
  }

  tokenBytes(token: number, skipSpecial: boolean): Uint8Array {
    if (skipSpecial && this.#parts.special.has(token)) return NOTHING
    let bytes = this.#bytes[token]
    if (bytes === undefined) {
      const spelling = this.#parts.tokens[token]
      bytes = spelling === undefined ? NOTHING : this.#parts.bytesOf(token, spelling)
      if (spelling !== undefined) this.#bytes[token] = bytes
    }
    return bytes
  }

  decode(tokens: ArrayLike<number>, options: { skipSpecial?: boolean } = {}): string {
    const skipSpecial = options.skipSpecial ?? false
    const bytes = Array.from(tokens, (token) => this.tokenBytes(token, skipSpecial))
    const text = decodeUtf8(Buffer.concat(bytes))
    return this.#parts.stripsSpace && text.startsWith(' ') ? text.slice(1) : text
  }

  detokenizer(options: { skipSpecial?: boolean; fromStart?: boolean } = {}): Detokenizer {
    const { skipSpecial = false, fromStart = false } = options
    return new StreamingDetokenizer(
      (token) => this.tokenBytes(token, skipSpecial),
      fromStart && this.#parts.stripsSpace,
    )
  }

  isSpecial(token: number): boolean {
    return this.#parts.special.has(token)
  }

  tokenText(token: number): string {
    return this.#parts.tokens[token] ?? ''
  }
}
