// Owns turning a prompt's text to tokens, after refusing at once what can never fit the context.

import type { EngineModel } from '../../engine/api.ts'
import { LatticeError } from '../../errors.ts'
import type { Tokenizer } from '../../text/tokenizer.ts'

/** Shorter text is encoded and then counted: it takes no time that others would notice. */
const SHORT_CHARACTERS = 1 << 16

/**
 * The tokens of `text`, special tokens' text recognised. A text of megabytes would hold up every
 * stream while it is encoded, so it is refused by its length if no vocabulary could make it fit.
 * @throws LatticeError `context_length_exceeded`, its count then a lower bound
 */
export function encodePrompt(
  text: string,
  addSpecial: boolean,
  tokenizer: Tokenizer,
  model: EngineModel,
  param: string,
): Int32Array {
  if (text.length > SHORT_CHARACTERS) {
    const least = Math.ceil(text.length / longestToken(tokenizer))
    if (least > model.contextLength) {
      throw promptTooLong(`at least ${least}`, model.contextLength, param)
    }
  }
  return tokenizer.encode(text, { addSpecial, parseSpecial: true })
}

export function promptTooLong(tokens: string, context: number, param: string): LatticeError {
  const what = `The prompt has ${tokens} tokens; the context holds ${context}, the answer included.`
  return new LatticeError('context_length_exceeded', what, {
    todo: 'Shorten the prompt.',
    details: { param },
  })
}

const longestByTokenizer = new WeakMap<Tokenizer, number>()

/** Bytes of the vocabulary's longest token: text of n characters is at least n / this tokens. */
function longestToken(tokenizer: Tokenizer): number {
  let longest = longestByTokenizer.get(tokenizer)
  if (longest === undefined) {
    longest = 1
    for (let token = 0; token < tokenizer.vocabSize; token++) {
      longest = Math.max(longest, tokenizer.tokenBytes(token, false).length)
    }
    longestByTokenizer.set(tokenizer, longest)
  }
  return longest
}
