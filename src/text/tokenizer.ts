// Owns the contract of a tokenizer; text-tokenizer.ts fulfils it for every kind of model.

/** Turns text to token ids and back, exactly as the model's authors' own tokenizer does. */
export interface Tokenizer {
  readonly vocabSize: number
  readonly bosToken: number | undefined
  /** Every id that ends a turn or a text (end of sequence, end of turn). */
  readonly eosTokens: readonly number[]
  /**
   * @param text any JavaScript string; lone surrogates become U+FFFD first, as UTF-8 encoding does.
   * @param options.addSpecial adds the model's begin/end tokens, as its metadata says; where the
   *   text itself begins with the begin token (parsed), there is still only one.
   * @param options.parseSpecial recognises special tokens' text (templates: yes, user text: no).
   */
  encode(text: string, options: { addSpecial: boolean; parseSpecial: boolean }): Int32Array
  /**
   * As `encode` without `parseSpecial`, from bytes: no string is made of them, and no new array.
   * @param utf8 nothing but UTF-8
   * @returns a view of memory that the next call uses again; undefined if this model's tokens
   *   cannot do without a string
   */
  encodeUtf8?(utf8: Uint8Array, addSpecial: boolean): Int32Array | undefined
  /** The bytes a token stands for; a special token's text, or nothing if `skipSpecial`. */
  tokenBytes(token: number, skipSpecial: boolean): Uint8Array
  /** Whole text; bytes that are not UTF-8 become U+FFFD. */
  decode(tokens: ArrayLike<number>, options?: { skipSpecial?: boolean }): string
  /**
   * Text piece by piece as tokens arrive; never emits half a character.
   * @param options.fromStart the tokens are a whole text, as `decode` takes them. Else they go on
   *   from a prompt, and a space that encoding would have put before a text is the model's own.
   */
  detokenizer(options?: { skipSpecial?: boolean; fromStart?: boolean }): Detokenizer
  isSpecial(token: number): boolean
  /** The token's surface as the vocabulary spells it, for logprobs' `token` field and debugging. */
  tokenText(token: number): string
}

export interface Detokenizer {
  /** The text that this token completes; '' while a character is unfinished. */
  push(token: number): string
  /** What was held back, with U+FFFD for bytes that never became a character. */
  end(): string
}
