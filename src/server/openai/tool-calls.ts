// Owns tool calls in an answer's text, in Hermes style: <tool_call>{"name", "arguments"} and the
// closing tag. What looks like one but does not parse stays text: nothing the model said is lost.

const OPEN = '<tool_call>'
const CLOSE = '</tool_call>'

export interface ToolCall {
  name: string
  /** JSON text, as OpenAI's API carries it. */
  arguments: string
}

export interface Parsed {
  text: string
  calls: ToolCall[]
}

/** Splits text that arrives piece by piece into plain text and calls. */
export class ToolCallParser {
  /** Text not yet decided upon: white space around calls, half a tag, or a call's inside. */
  #held = ''
  /** White space right after a call separates it from the next; it is no text of its own. */
  #afterCall = false

  push(piece: string): Parsed {
    this.#held += piece
    const parsed: Parsed = { text: '', calls: [] }
    while (this.#step(parsed));
    return parsed
  }

  /** What is left when the text ends: an unfinished call is text. */
  end(): Parsed {
    const text = this.#afterCall && this.#held.trim() === '' ? '' : this.#held
    this.#held = ''
    return { text, calls: [] }
  }

  /** Takes the next text or call off the held text; false if more must arrive first. */
  #step(parsed: Parsed): boolean {
    const open = this.#held.indexOf(OPEN)
    if (open === -1) {
      this.#release(parsed, this.#held.length - partialTag(this.#held))
      return false
    }
    const close = this.#held.indexOf(CLOSE, open)
    if (close === -1) {
      this.#release(parsed, open)
      return false
    }
    this.#release(parsed, open)
    const end = close - open + CLOSE.length
    const call = parseCall(this.#held.slice(OPEN.length, end - CLOSE.length))
    if (call) parsed.calls.push(call)
    else parsed.text += this.#held.slice(0, end)
    this.#afterCall = call !== undefined
    this.#held = this.#held.slice(end)
    return true
  }

  /** Gives out the first `length` characters, unless they are only white space after a call. */
  #release(parsed: Parsed, length: number): void {
    const text = this.#held.slice(0, length)
    const blank = text.trim() === ''
    if (
      this.#afterCall &&
      blank &&
      length < this.#held.length &&
      this.#held.startsWith(OPEN, length)
    ) {
      this.#held = this.#held.slice(length)
      return
    }
    if (this.#afterCall && blank) return
    parsed.text += text
    this.#held = this.#held.slice(length)
    this.#afterCall = false
  }
}

/** How many characters at the end could begin an opening tag. */
function partialTag(text: string): number {
  for (let length = Math.min(OPEN.length - 1, text.length); length > 0; length--) {
    if (OPEN.startsWith(text.slice(-length))) return length
  }
  return 0
}

function parseCall(json: string): ToolCall | undefined {
  let value: unknown
  try {
    value = JSON.parse(json)
  } catch {
    return undefined
  }
  if (typeof value !== 'object' || value === null) return undefined
  const { name, arguments: given } = value as { name?: unknown; arguments?: unknown }
  if (typeof name !== 'string') return undefined
  if (given !== undefined && (typeof given !== 'object' || given === null)) return undefined
  return { name, arguments: JSON.stringify(given ?? {}) }
}
