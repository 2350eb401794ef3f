// Owns finding added and special tokens in text, before anything else looks at it: leftmost
// first, the longest of those, with the strip and word rules a tokenizer.json may give.

export interface AddedToken {
  id: number
  content: string
  /** Only recognised where special tokens are parsed; hidden by `skipSpecial`. */
  special: boolean
  /** Not inside a word. */
  singleWord: boolean
  /** White space before it, after it, is part of the match. */
  lstrip: boolean
  rstrip: boolean
  /** Searched in normalized text; the others are searched first, in the text as given. */
  normalized: boolean
}

/** A stretch of text, or a token that was found in it. */
export type Segment = string | number

const WORD_AT_END = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]$/v
const WORD_AT_START = /^[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]/v
const SPACE = /^\p{White_Space}$/v

interface Node {
  children: Map<number, Node>
  token: AddedToken | undefined
}

export class AddedTokenMatcher {
  readonly #root: Node = { children: new Map(), token: undefined }
  /** What tokens start with, a code unit each: nothing else is looked at. */
  readonly #starts: readonly string[]
  /** All are special: where those are not parsed, nothing is cut. */
  readonly allSpecial: boolean

  constructor(tokens: Iterable<AddedToken>, spelling: (content: string) => string = (c) => c) {
    const starts = new Set<string>()
    let allSpecial = true
    for (const token of tokens) {
      const content = spelling(token.content)
      if (content === '') continue
      allSpecial &&= token.special
      starts.add(content[0]!)
      let node = this.#root
      for (let i = 0; i < content.length; i++) {
        const unit = content.charCodeAt(i)
        let child = node.children.get(unit)
        if (child === undefined) {
          child = { children: new Map(), token: undefined }
          node.children.set(unit, child)
        }
        node = child
      }
      node.token = token
    }
    this.#starts = [...starts]
    this.allSpecial = allSpecial
  }

  /**
   * Cuts `text` at tokens. Without `parseSpecial` a special token's text stays text.
   *
   * @returns text and token ids in order; no text is empty
   */
  split(text: string, parseSpecial: boolean): Segment[] {
    if (!parseSpecial && this.allSpecial) return text === '' ? [] : [text]
    const segments: Segment[] = []
    let done = 0
    // Where each start comes next: most text has none of them, which is told faster than read.
    const next = this.#starts.map((start) => ({ start, at: text.indexOf(start) }))
    for (let at = 0; ;) {
      at = soonest(text, next, at)
      if (at < 0) break
      const match = this.#longest(text, at)
      if (match === undefined) {
        at++
        continue
      }
      const { token, end } = match
      // Like Hugging Face's matcher: what was found but may not be used is passed over whole.
      at = end
      if (token.special && !parseSpecial) continue
      let from = match.from
      if (token.singleWord && !standsAlone(text, from, end)) continue
      let to = end
      if (token.lstrip) while (from > done && SPACE.test(text[from - 1]!)) from--
      if (token.rstrip) while (to < text.length && SPACE.test(text[to]!)) to++
      if (from > done) segments.push(text.slice(done, from))
      segments.push(token.id)
      done = to
    }
    if (done < text.length) segments.push(done === 0 ? text : text.slice(done))
    return segments
  }

  #longest(
    text: string,
    from: number,
  ): { token: AddedToken; from: number; end: number } | undefined {
    let found: { token: AddedToken; from: number; end: number } | undefined
    let node: Node | undefined = this.#root
    for (let at = from; at < text.length; at++) {
      node = node.children.get(text.charCodeAt(at))
      if (node === undefined) break
      if (node.token !== undefined) found = { token: node.token, from, end: at + 1 }
    }
    return found
  }
}

/** The first place from `from` on where a token may start; -1 if there is none. */
function soonest(text: string, next: { start: string; at: number }[], from: number): number {
  let first = -1
  for (const one of next) {
    if (one.at >= 0 && one.at < from) one.at = text.indexOf(one.start, from)
    if (one.at >= 0 && (first < 0 || one.at < first)) first = one.at
  }
  return first
}

function standsAlone(text: string, from: number, to: number): boolean {
  // Two code units are enough to see the character next to the match.
  return (
    !WORD_AT_END.test(text.slice(Math.max(0, from - 2), from)) &&
    !WORD_AT_START.test(text.slice(to, to + 2))
  )
}
