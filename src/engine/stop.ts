// Owns stop strings: finds the first one in text that arrives in pieces, and holds back what may
// yet become part of one, so that no half of a stop string is ever shown.

import { assert } from '../assert.ts'
import { LatticeError } from '../errors.ts'
import { MAX_STOP_BYTES, MAX_STOP_STRINGS } from '../limits.ts'

/**
 * Searches for several strings at once. The match that is complete first wins, and of those
 * complete at the same place the longest; so the outcome does not depend on how the text was
 * split. Each string is followed by its own automaton (Knuth, Morris, Pratt 1977), which costs a
 * few comparisons a character and string and always knows how much of the text's end to keep.
 *
 * @example
 * const stop = new StopMatcher(['###'])
 * stop.push('a#') // 'a'
 * stop.push('b##') // '#b'
 * stop.push('#c') // ''; stop.matched is '###'
 */
export class StopMatcher {
  /** The stop string that was found; nothing more may be pushed then. */
  matched: string | undefined
  readonly #stops: readonly string[]
  readonly #failures: readonly Uint16Array[]
  /** By stop string: how many of its first characters the text ends with. */
  readonly #progress: Uint16Array
  #held = ''

  /** @throws LatticeError `invalid_request` for strings that are too many, too long, or empty. */
  constructor(stops: readonly string[]) {
    checkStops(stops)
    this.#stops = stops
    this.#failures = stops.map(failuresOf)
    this.#progress = new Uint16Array(stops.length)
  }

  /**
   * @param text the next piece, whole characters.
   * @returns text that is final, up to the match if there is one.
   */
  push(text: string): string {
    assert(this.matched === undefined, 'no text follows a stop string')
    if (this.#stops.length === 0 || text === '') return text
    for (let i = 0; i < text.length; i++) {
      const length = this.#advance(text.charCodeAt(i))
      if (length === 0) continue
      const before = this.#held + text.slice(0, i + 1)
      this.#held = ''
      return before.slice(0, before.length - length)
    }
    const all = this.#held + text
    const cut = all.length - this.#longestProgress()
    this.#held = all.slice(cut)
    return all.slice(0, cut)
  }

  /** What was held back, at the end of the text. */
  end(): string {
    const rest = this.#held
    this.#held = ''
    return rest
  }

  /** Takes one UTF-16 unit; the length of the longest stop string that it completes, or 0. */
  #advance(unit: number): number {
    const progress = this.#progress
    let longest = 0
    for (let s = 0; s < this.#stops.length; s++) {
      const stop = this.#stops[s]!
      let matched = progress[s]!
      while (matched > 0 && stop.charCodeAt(matched) !== unit) {
        matched = this.#failures[s]![matched - 1]!
      }
      if (stop.charCodeAt(matched) === unit) matched += 1
      progress[s] = matched
      if (matched === stop.length && matched > longest) {
        longest = matched
        this.matched = stop
      }
    }
    return longest
  }

  #longestProgress(): number {
    let longest = 0
    for (let s = 0; s < this.#progress.length; s++) {
      longest = Math.max(longest, this.#progress[s]!)
    }
    return longest
  }
}

/** At i: the length of the longest proper prefix of `stop` that ends its first i + 1 units. */
function failuresOf(stop: string): Uint16Array {
  const failures = new Uint16Array(stop.length)
  let matched = 0
  for (let i = 1; i < stop.length; i++) {
    while (matched > 0 && stop[i] !== stop[matched]) matched = failures[matched - 1]!
    if (stop[i] === stop[matched]) matched += 1
    failures[i] = matched
  }
  return failures
}

function checkStops(stops: readonly string[]): void {
  if (stops.length > MAX_STOP_STRINGS) {
    throw invalid(`${stops.length} stop strings were given; ${MAX_STOP_STRINGS} may be.`)
  }
  for (const stop of stops) {
    const bytes = Buffer.byteLength(stop)
    if (bytes === 0) throw invalid('A stop string is empty.')
    if (bytes > MAX_STOP_BYTES) {
      throw invalid(`A stop string has ${bytes} bytes; ${MAX_STOP_BYTES} may be.`)
    }
    if (!stop.isWellFormed()) throw invalid('A stop string is not valid Unicode.')
  }
}

function invalid(what: string): LatticeError {
  return new LatticeError('invalid_request', what, {
    todo: `Send at most ${MAX_STOP_STRINGS} strings of 1 to ${MAX_STOP_BYTES} bytes each.`,
    details: { param: 'stop' },
  })
}
