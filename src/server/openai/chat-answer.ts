// Owns the JSON of a chat's answer: the whole document, or chunks built by joining strings.

import { randomUUID } from 'node:crypto'
import type { GenerationEvent } from '../../engine/generation.ts'
import type { Tokenizer } from '../../text/tokenizer.ts'
import type { Document, Frames } from './answer.ts'
import { type ChatTokenLogprobs, chatLogprobs } from './logprobs.ts'
import type { Usage } from './run.ts'
import { type Parsed, type ToolCall, ToolCallParser } from './tool-calls.ts'

/** What an answer's JSON depends on besides its events. */
export interface ChatShape {
  id: string
  model: string
  choices: number
  logprobs: boolean
  /** Tools were offered, so calls in the text are parsed. */
  tools: boolean
  includeUsage: boolean
}

type Finish = GenerationEvent & { kind: 'finish' }

/** A choice's text on its way: plain, or split into text and calls. */
class ChatText {
  readonly #parser: ToolCallParser | undefined
  calls = 0

  constructor(tools: boolean) {
    this.#parser = tools ? new ToolCallParser() : undefined
  }

  push(text: string): Parsed {
    return this.#count(this.#parser?.push(text) ?? { text, calls: [] })
  }

  end(): Parsed {
    return this.#count(this.#parser?.end() ?? { text: '', calls: [] })
  }

  finishReason(event: Finish): string {
    return event.reason === 'stop' && this.calls > 0 ? 'tool_calls' : event.reason
  }

  #count(parsed: Parsed): Parsed {
    this.calls += parsed.calls.length
    return parsed
  }
}

interface DocumentChoice {
  text: ChatText
  content: string
  toolCalls: object[]
  logprobs: ChatTokenLogprobs[]
  finishReason: string | null
}

export class ChatDocument implements Document {
  readonly #shape: ChatShape
  readonly #tokenizer: Tokenizer
  readonly #created = unixSeconds()
  readonly #choices: DocumentChoice[]

  constructor(shape: ChatShape, tokenizer: Tokenizer) {
    this.#shape = shape
    this.#tokenizer = tokenizer
    this.#choices = Array.from({ length: shape.choices }, () => ({
      text: new ChatText(shape.tools),
      content: '',
      toolCalls: [],
      logprobs: [],
      finishReason: null,
    }))
  }

  take(event: GenerationEvent): void {
    const choice = this.#choices[event.choice]!
    const parsed = event.kind === 'delta' ? choice.text.push(event.text) : choice.text.end()
    choice.content += parsed.text
    choice.toolCalls.push(...parsed.calls.map(toolCallJson))
    if (event.kind === 'finish') choice.finishReason = choice.text.finishReason(event)
    else if (this.#shape.logprobs) {
      choice.logprobs.push(...chatLogprobs(event.tokens, this.#tokenizer))
    }
  }

  json(usage: Usage): object {
    return {
      id: this.#shape.id,
      object: 'chat.completion',
      created: this.#created,
      model: this.#shape.model,
      choices: this.#choices.map((choice, index) => ({
        index,
        message: message(choice),
        logprobs: this.#shape.logprobs ? { content: choice.logprobs, refusal: null } : null,
        finish_reason: choice.finishReason,
      })),
      usage,
    }
  }
}

function message(choice: DocumentChoice): object {
  const called = choice.toolCalls.length > 0
  return {
    role: 'assistant',
    content: called && choice.content === '' ? null : choice.content,
    refusal: null,
    ...(called ? { tool_calls: choice.toolCalls } : {}),
  }
}

interface FrameChoice {
  text: ChatText
  /** Everything of a frame before its delta. */
  head: string
  begun: boolean
}

export class ChatFrames implements Frames {
  readonly #tokenizer: Tokenizer
  readonly #shape: ChatShape
  readonly #start: string
  readonly #choices: FrameChoice[]
  /** What ends a frame after its finish_reason. */
  readonly #tail: string

  constructor(shape: ChatShape, tokenizer: Tokenizer) {
    this.#tokenizer = tokenizer
    this.#shape = shape
    this.#start =
      `data: {"id":${JSON.stringify(shape.id)},"object":"chat.completion.chunk",` +
      `"created":${unixSeconds()},"model":${JSON.stringify(shape.model)},"choices":[`
    this.#tail = shape.includeUsage ? '}],"usage":null}\n\n' : '}]}\n\n'
    this.#choices = Array.from({ length: shape.choices }, (_, index) => ({
      text: new ChatText(shape.tools),
      head: `${this.#start}{"index":${index},"delta":`,
      begun: false,
    }))
  }

  of(event: GenerationEvent): string {
    const choice = this.#choices[event.choice]!
    if (event.kind === 'finish') return this.#finish(choice, event)
    const { text, calls } = choice.text.push(event.text)
    const logprobs = this.#logprobs(event)
    // Tokens whose text is held back still report their logprobs, with an empty text.
    if (text === '' && calls.length === 0 && logprobs === 'null') return ''
    const content = text === '' && logprobs === 'null' ? '' : this.#content(choice, text, logprobs)
    return this.#role(choice) + content + this.#calls(choice, calls)
  }

  usage(usage: Usage): string {
    return this.#shape.includeUsage ? `${this.#start}],"usage":${JSON.stringify(usage)}}\n\n` : ''
  }

  #finish(choice: FrameChoice, event: Finish): string {
    const { text } = choice.text.end()
    const reason = JSON.stringify(choice.text.finishReason(event))
    return (
      this.#role(choice) +
      (text === '' ? '' : this.#content(choice, text, 'null')) +
      this.#frame(choice, '{}', 'null', reason)
    )
  }

  /** The role goes out with the first token, not before: it would pass for one. */
  #role(choice: FrameChoice): string {
    if (choice.begun) return ''
    choice.begun = true
    return this.#frame(choice, '{"role":"assistant","content":"","refusal":null}', 'null', 'null')
  }

  #content(choice: FrameChoice, text: string, logprobs: string): string {
    return this.#frame(choice, `{"content":${JSON.stringify(text)}}`, logprobs, 'null')
  }

  #calls(choice: FrameChoice, calls: readonly ToolCall[]): string {
    const first = choice.text.calls - calls.length
    return calls
      .map((call, i) =>
        JSON.stringify({ tool_calls: [{ index: first + i, ...toolCallJson(call) }] }),
      )
      .map((delta) => this.#frame(choice, delta, 'null', 'null'))
      .join('')
  }

  #logprobs(event: GenerationEvent & { kind: 'delta' }): string {
    if (!this.#shape.logprobs || event.tokens.length === 0) return 'null'
    return JSON.stringify({ content: chatLogprobs(event.tokens, this.#tokenizer), refusal: null })
  }

  #frame(choice: FrameChoice, delta: string, logprobs: string, finish: string): string {
    return `${choice.head}${delta},"logprobs":${logprobs},"finish_reason":${finish}${this.#tail}`
  }
}

function toolCallJson(call: ToolCall): object {
  const id = `call_${randomUUID().replaceAll('-', '').slice(0, 24)}`
  return { id, type: 'function', function: { name: call.name, arguments: call.arguments } }
}

export function unixSeconds(): number {
  return Math.floor(Date.now() / 1000)
}
