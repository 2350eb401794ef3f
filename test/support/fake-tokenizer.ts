// Owns a tokenizer for tests: a token is a byte, and three special tokens follow.

import type { Detokenizer, Tokenizer } from '../../src/text/tokenizer.ts'

export const BOS = 256
export const EOS = 257
export const END_OF_TURN = 258
const SPECIAL_TEXT = ['<|bos|>', '<|eos|>', '<|end|>']
const VOCAB_SIZE = 256 + SPECIAL_TEXT.length

export function fakeTokenizer(): Tokenizer {
  const tokenBytes = (token: number, skipSpecial: boolean): Uint8Array => {
    if (token < 256) return Uint8Array.of(token)
    return Buffer.from(skipSpecial ? '' : SPECIAL_TEXT[token - 256]!)
  }
  return {
    vocabSize: VOCAB_SIZE,
    bosToken: BOS,
    eosTokens: [EOS, END_OF_TURN],
    encode(text, { addSpecial, parseSpecial }) {
      const tokens = addSpecial ? [BOS] : []
      const pieces = parseSpecial ? text.split(/(<\|(?:bos|eos|end)\|>)/) : [text]
      for (const piece of pieces) {
        const special = parseSpecial ? SPECIAL_TEXT.indexOf(piece) : -1
        if (special >= 0) tokens.push(256 + special)
        else for (const byte of Buffer.from(piece)) tokens.push(byte)
      }
      return Int32Array.from(tokens)
    },
    tokenBytes,
    decode(tokens, options) {
      const skip = options?.skipSpecial ?? false
      return Buffer.concat(Array.from(tokens, (token) => tokenBytes(token, skip))).toString()
    },
    detokenizer(options): Detokenizer {
      const decoder = new TextDecoder('utf-8', { ignoreBOM: true })
      const skip = options?.skipSpecial ?? false
      return {
        push: (token) => decoder.decode(tokenBytes(token, skip), { stream: true }),
        end: () => decoder.decode(),
      }
    },
    isSpecial: (token) => token >= 256,
    tokenText: (token) => (token < 256 ? `<0x${token.toString(16)}>` : SPECIAL_TEXT[token - 256]!),
  }
}
