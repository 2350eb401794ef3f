// Owns how log-probabilities are written: chat's list of tokens with bytes, completions' columns.

import type { TokenLogprobs } from '../../engine/api.ts'
import type { DeltaToken } from '../../engine/generation.ts'
import type { Detokenizer, Tokenizer } from '../../text/tokenizer.ts'

interface ChatToken {
  token: string
  logprob: number
  bytes: number[]
}

export interface ChatTokenLogprobs extends ChatToken {
  top_logprobs: ChatToken[]
}

/** One entry a token; `bytes` is exact where `token` shows U+FFFD for half a character. */
export function chatLogprobs(
  tokens: readonly DeltaToken[],
  tokenizer: Tokenizer,
): ChatTokenLogprobs[] {
  return tokens.flatMap(({ token, logprobs }) =>
    logprobs === undefined
      ? []
      : {
          ...chatToken(token, logprobs.logprob, tokenizer),
          top_logprobs: logprobs.top.map((top) => chatToken(top.token, top.logprob, tokenizer)),
        },
  )
}

function chatToken(token: number, logprob: number, tokenizer: Tokenizer): ChatToken {
  const bytes = tokenizer.tokenBytes(token, false)
  return { token: Buffer.from(bytes).toString(), logprob: finite(logprob), bytes: [...bytes] }
}

/** Completions' four parallel lists. */
export interface CompletionLogprobs {
  tokens: string[]
  token_logprobs: number[]
  top_logprobs: Record<string, number>[]
  text_offset: number[]
}

/** Collects a choice's tokens; offsets count characters from the start of the choice's text. */
export class CompletionLogprobsWriter {
  readonly #tokenizer: Tokenizer
  readonly #detokenizer: Detokenizer
  #offset: number

  /** @param offset where the output starts: after the prompt if it is echoed */
  constructor(tokenizer: Tokenizer, offset: number) {
    this.#tokenizer = tokenizer
    this.#detokenizer = tokenizer.detokenizer({ skipSpecial: true })
    this.#offset = offset
  }

  write(tokens: readonly DeltaToken[]): CompletionLogprobs {
    const columns = emptyColumns()
    for (const { token, logprobs } of tokens) {
      if (logprobs === undefined) continue
      columns.tokens.push(this.#text(token))
      columns.token_logprobs.push(finite(logprobs.logprob))
      columns.text_offset.push(this.#offset)
      columns.top_logprobs.push(this.#top(token, logprobs))
      // A character of several tokens counts once, with the token that completes it.
      this.#offset += this.#detokenizer.push(token).length
    }
    return columns
  }

  /** OpenAI's API reports the chosen token too, even if it is not among the top ones. */
  #top(chosen: number, logprobs: TokenLogprobs): Record<string, number> {
    const top: Record<string, number> = {}
    for (const { token, logprob } of logprobs.top) top[this.#text(token)] ??= finite(logprob)
    top[this.#text(chosen)] ??= finite(logprobs.logprob)
    return top
  }

  #text(token: number): string {
    return Buffer.from(this.#tokenizer.tokenBytes(token, false)).toString()
  }
}

export function emptyColumns(): CompletionLogprobs {
  return { tokens: [], token_logprobs: [], top_logprobs: [], text_offset: [] }
}

export function appendColumns(to: CompletionLogprobs, more: CompletionLogprobs): void {
  to.tokens.push(...more.tokens)
  to.token_logprobs.push(...more.token_logprobs)
  to.top_logprobs.push(...more.top_logprobs)
  to.text_offset.push(...more.text_offset)
}

/** JSON has no infinity; a banned token's is written as the API's customary -9999. */
function finite(logprob: number): number {
  return Number.isFinite(logprob) ? logprob : -9999
}
