// Owns the cutting of text into pieces before a model sees it: the pre-tokenizers that a
// tokenizer.json may declare, each a function from pieces to pieces.

import { spellBytes } from './byte-alphabet.ts'
import { LatticeError } from '../errors.ts'
import { compilePattern } from './regex.ts'

/** Pieces in order, none empty. */
export interface Pieces {
  texts: string[]
  /** The first piece starts where the whole text starts: some put a space there only. */
  atStart: boolean
}

export interface PreTokenizer {
  (pieces: Pieces): Pieces
  /**
   * What it does where `isWordCut` says that a word begins: cuts, or lets the piece pass but for
   * cuts elsewhere that would be the same if it were cut there. Undefined if nobody has shown it.
   */
  readonly atWords?: AtWords
}

export type AtWords = 'cuts' | 'passes'

/** Says what a step does where words begin. */
export function atWords(does: AtWords, step: PreTokenizer): PreTokenizer {
  return Object.assign((pieces: Pieces) => step(pieces), { atWords: does })
}

/** What becomes of a match: hugging-face's SplitDelimiterBehavior. */
export type SplitBehavior =
  | 'Removed'
  | 'Isolated'
  | 'MergedWithPrevious'
  | 'MergedWithNext'
  | 'Contiguous'

/** GPT-2's words (Radford et al. 2019): contractions, letters, numbers, other, white space. */
export const GPT2_PATTERN = compilePattern(
  String.raw`'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`,
)

/** One step after the other. */
export function inSequence(steps: readonly PreTokenizer[]): PreTokenizer {
  const all: PreTokenizer = (pieces) => steps.reduce((before, step) => step(before), pieces)
  if (!steps.every((step) => step.atWords)) return all
  return atWords(steps.some((step) => step.atWords === 'cuts') ? 'cuts' : 'passes', all)
}

/** Cuts at matches of `pattern` (flag g); what lies between matches are pieces of their own. */
export function split(
  pattern: RegExp,
  behavior: SplitBehavior = 'Isolated',
  invert = false,
): PreTokenizer {
  return ({ texts, atStart }) => {
    const out: string[] = []
    let startKept = atStart
    texts.forEach((text, index) => {
      const before = out.length
      if (behavior === 'Isolated') isolate(text, pattern, out)
      else cut(text, pattern, behavior, invert, out)
      if (index === 0 && atStart) startKept = out.length > before && text.startsWith(out[before]!)
    })
    return { texts: out, atStart: startKept && out.length > 0 }
  }
}

/** The usual case, quickly: every match and every gap is a piece. */
function isolate(text: string, pattern: RegExp, out: string[]): void {
  let end = 0
  pattern.lastIndex = 0
  for (let match = find(pattern, text); match !== null; match = find(pattern, text)) {
    const at = match.index
    if (at > end) out.push(text.slice(end, at))
    const found = match[0]
    if (found.length > 0) out.push(found)
    else pattern.lastIndex = at + (text.codePointAt(at)! > 0xffff ? 2 : 1)
    end = at + found.length
  }
  if (end < text.length) out.push(end === 0 ? text : text.slice(end))
}

interface Span {
  from: number
  to: number
  match: boolean
}

function cut(
  text: string,
  pattern: RegExp,
  behavior: SplitBehavior,
  invert: boolean,
  out: string[],
): void {
  const spans = spansOf(text, pattern)
  if (invert) for (const span of spans) span.match = !span.match
  const kept = behavior === 'Removed' ? spans.filter((span) => !span.match) : join(spans, behavior)
  for (const { from, to } of kept) if (to > from) out.push(text.slice(from, to))
}

/** Matches and gaps, in order, covering the text. */
function spansOf(text: string, pattern: RegExp): Span[] {
  const spans: Span[] = []
  let end = 0
  pattern.lastIndex = 0
  for (let match = find(pattern, text); match !== null; match = find(pattern, text)) {
    const from = match.index
    const to = from + match[0].length
    if (from > end) spans.push({ from: end, to: from, match: false })
    spans.push({ from, to, match: true })
    if (from === to) pattern.lastIndex = from + (text.codePointAt(from)! > 0xffff ? 2 : 1)
    end = to
  }
  if (end < text.length) spans.push({ from: end, to: text.length, match: false })
  return spans
}

function join(spans: Span[], behavior: SplitBehavior): Span[] {
  if (behavior === 'Isolated') return spans
  const backwards = behavior === 'MergedWithNext'
  const joined: Span[] = []
  let previousMatch = false
  for (const span of backwards ? spans.toReversed() : spans) {
    const last = joined.at(-1)
    const joins =
      behavior === 'Contiguous' ? span.match === previousMatch : span.match && !previousMatch
    if (joins && last !== undefined) {
      if (backwards) last.from = span.from
      else last.to = span.to
    } else {
      joined.push({ ...span })
    }
    previousMatch = span.match
  }
  return backwards ? joined.reverse() : joined
}

/** `exec`, with an error a user can act on where the matcher's stack ends (millions of units). */
function find(pattern: RegExp, text: string): RegExpExecArray | null {
  try {
    return pattern.exec(text)
  } catch (cause) {
    throw new LatticeError(
      'invalid_request',
      `A run of ${text.length} characters without a word boundary is too long to tokenize.`,
      { todo: 'Shorten the text; a run of a million characters is fine.', cause },
    )
  }
}

const NUMBER = /\p{N}/gv
const NUMBERS = /\p{N}+/gv
const SPACES = /\p{White_Space}/gv
/** The `\w` of Rust's regex crate, which these two pre-tokenizers use. */
const WORD = String.raw`\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}`
const WORDS = new RegExp(String.raw`[${WORD}]+|[^${WORD}\p{White_Space}]+`, 'gv')
const PUNCTUATION = /[\p{P}!-\/:-@\[-`\{-~]/gv

export const gpt2Words: PreTokenizer = atWords('cuts', split(GPT2_PATTERN))
export const digits = (individual: boolean): PreTokenizer =>
  atWords('passes', split(individual ? NUMBER : NUMBERS))
export const punctuation = (behavior: SplitBehavior): PreTokenizer =>
  // Merged with what is next to it, a match would reach across.
  behavior === 'Isolated' || behavior === 'Contiguous'
    ? atWords('passes', split(PUNCTUATION, behavior))
    : split(PUNCTUATION, behavior)
export const whitespace: PreTokenizer = split(WORDS, 'Removed', true)
export const whitespaceSplit: PreTokenizer = split(SPACES, 'Removed')

/** Puts a space before every piece that lacks one. */
export const prefixSpace: PreTokenizer = ({ texts, atStart }) => ({
  texts: texts.map((text) => (text.startsWith(' ') ? text : ` ${text}`)),
  atStart,
})

/** Spells pieces in the byte alphabet, for steps that follow and see the spelling. */
export const byteSpelling = atWords('passes', ({ texts, atStart }) => ({
  texts: texts.map(spellBytes),
  atStart,
}))

/** Spaces become `replacement`, one is put in front (`prepend`), words are cut before each. */
export function metaspace(
  replacement: string,
  prepend: 'always' | 'first' | 'never',
  cutting: boolean,
): PreTokenizer {
  const cutBefore = split(new RegExp(replacement, 'gv'), 'MergedWithNext')
  return ({ texts, atStart }) => {
    const replaced = texts.map((text, index) => {
      const spaced = text.replaceAll(' ', replacement)
      const wanted = prepend === 'always' || (prepend === 'first' && index === 0 && atStart)
      return wanted && !spaced.startsWith(replacement) ? replacement + spaced : spaced
    })
    const pieces = { texts: replaced, atStart }
    return cutting ? cutBefore(pieces) : pieces
  }
}
