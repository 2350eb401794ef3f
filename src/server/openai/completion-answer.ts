// Owns the JSON of a completion's answer: the whole document, or chunks built by joining strings.

import type { GenerationEvent } from '../../engine/generation.ts'
import type { Tokenizer } from '../../text/tokenizer.ts'
import type { Document, Frames } from './answer.ts'
import { unixSeconds } from './chat-answer.ts'
import {
  appendColumns,
  type CompletionLogprobs,
  CompletionLogprobsWriter,
  emptyColumns,
} from './logprobs.ts'
import type { Usage } from './run.ts'

/** What an answer's JSON depends on besides its events. */
export interface CompletionShape {
  id: string
  model: string
  logprobs: number | undefined
  /** The text each choice starts with, by choice. */
  echoes: readonly string[]
  includeUsage: boolean
}

interface DocumentChoice {
  text: string
  writer: CompletionLogprobsWriter
  logprobs: CompletionLogprobs
  finishReason: string | null
}

export class CompletionDocument implements Document {
  readonly #shape: CompletionShape
  readonly #created = unixSeconds()
  readonly #choices: DocumentChoice[]

  constructor(shape: CompletionShape, tokenizer: Tokenizer) {
    this.#shape = shape
    this.#choices = shape.echoes.map((echo) => ({
      text: echo,
      writer: new CompletionLogprobsWriter(tokenizer, echo.length),
      logprobs: emptyColumns(),
      finishReason: null,
    }))
  }

  take(event: GenerationEvent): void {
    const choice = this.#choices[event.choice]!
    if (event.kind === 'finish') {
      choice.finishReason = event.reason
      return
    }
    choice.text += event.text
    if (this.#shape.logprobs !== undefined) {
      appendColumns(choice.logprobs, choice.writer.write(event.tokens))
    }
  }

  json(usage: Usage): object {
    return {
      id: this.#shape.id,
      object: 'text_completion',
      created: this.#created,
      model: this.#shape.model,
      choices: this.#choices.map((choice, index) => ({
        index,
        text: choice.text,
        logprobs: this.#shape.logprobs === undefined ? null : choice.logprobs,
        finish_reason: choice.finishReason,
      })),
      usage,
    }
  }
}

interface FrameChoice {
  head: string
  /** Sent with the choice's first frame. */
  echo: string
  writer: CompletionLogprobsWriter
}

export class CompletionFrames implements Frames {
  readonly #shape: CompletionShape
  readonly #start: string
  readonly #tail: string
  readonly #choices: FrameChoice[]

  constructor(shape: CompletionShape, tokenizer: Tokenizer) {
    this.#shape = shape
    this.#start =
      `data: {"id":${JSON.stringify(shape.id)},"object":"text_completion",` +
      `"created":${unixSeconds()},"model":${JSON.stringify(shape.model)},"choices":[`
    this.#tail = shape.includeUsage ? '}],"usage":null}\n\n' : '}]}\n\n'
    this.#choices = shape.echoes.map((echo, index) => ({
      head: `${this.#start}{"index":${index},"text":`,
      echo,
      writer: new CompletionLogprobsWriter(tokenizer, echo.length),
    }))
  }

  of(event: GenerationEvent): string {
    const choice = this.#choices[event.choice]!
    const text = choice.echo + (event.kind === 'delta' ? event.text : '')
    choice.echo = ''
    if (event.kind === 'finish') {
      return this.#frame(choice, text, 'null', JSON.stringify(event.reason))
    }
    const reported = this.#shape.logprobs !== undefined && event.tokens.length > 0
    if (text === '' && !reported) return ''
    const logprobs = reported ? JSON.stringify(choice.writer.write(event.tokens)) : 'null'
    return this.#frame(choice, text, logprobs, 'null')
  }

  usage(usage: Usage): string {
    return this.#shape.includeUsage ? `${this.#start}],"usage":${JSON.stringify(usage)}}\n\n` : ''
  }

  #frame(choice: FrameChoice, text: string, logprobs: string, finish: string): string {
    const json = JSON.stringify(text)
    return `${choice.head}${json},"logprobs":${logprobs},"finish_reason":${finish}${this.#tail}`
  }
}
