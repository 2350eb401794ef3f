// Owns the translation of tokenizer patterns, written for Oniguruma (Ruby syntax), into JavaScript
// regular expressions that match the same text. What cannot be translated exactly is an error.

import { LatticeError } from '../errors.ts'

const SPACE = '\\p{White_Space}'
/** Oniguruma's \w, with the six Latin-1 numerals that its tables add. */
const WORD = '[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\xb2\\xb3\\xb9\\xbc-\\xbe]'
const NOT_WORD = WORD.replace('[', '[^')

/** Escapes that mean a set of characters; usable inside and outside of brackets. */
const SET_ESCAPES: Readonly<Record<string, string>> = {
  s: SPACE,
  S: '\\P{White_Space}',
  w: WORD,
  W: NOT_WORD,
  d: '\\p{Nd}',
  D: '\\P{Nd}',
  h: '[0-9A-Fa-f]',
  H: '[^0-9A-Fa-f]',
}

/** Escapes that mean a place. `^` and `$` hold at every line in Ruby, and \n alone ends one. */
const PLACE_ESCAPES: Readonly<Record<string, string>> = {
  A: '(?<![^])',
  z: '(?![^])',
  Z: '(?=\\n?(?![^]))',
  b: `(?:(?<=${WORD})(?!${WORD})|(?<!${WORD})(?=${WORD}))`,
  B: `(?:(?<=${WORD})(?=${WORD})|(?<!${WORD})(?!${WORD}))`,
}

const CONTROL_ESCAPES: Readonly<Record<string, number>> = {
  n: 10,
  r: 13,
  t: 9,
  f: 12,
  v: 11,
  a: 7,
  e: 27,
  0: 0,
}

/**
 * Compiles an Oniguruma pattern to a global JavaScript expression (flags `gv`).
 *
 * @throws LatticeError `model_unsupported`, naming the construct it cannot translate exactly
 */
export function compilePattern(pattern: string): RegExp {
  const source = new Translator(pattern).translate()
  try {
    return new RegExp(source, 'gv')
  } catch (cause) {
    throw unsupported(pattern, cause instanceof Error ? cause.message : String(cause))
  }
}

/** A pattern that matches `text` itself. */
export function literalPattern(text: string): RegExp {
  return new RegExp(Array.from(text, literal).join(''), 'gv')
}

function unsupported(pattern: string, why: string): LatticeError {
  return new LatticeError(
    'model_unsupported',
    `The tokenizer's pattern ${JSON.stringify(pattern)} cannot be translated: ${why}.`,
    { todo: 'Report the model; its text cannot be tokenized exactly by this version.' },
  )
}

/** One character, escaped so that it means itself inside and outside of brackets. */
function literal(char: string): string {
  return /^[\p{L}\p{N}]$/v.test(char) ? char : `\\u{${char.codePointAt(0)!.toString(16)}}`
}

class Translator {
  readonly #pattern: string
  readonly #chars: readonly string[]
  #at = 0
  #atomics = 0

  constructor(pattern: string) {
    this.#pattern = pattern
    this.#chars = Array.from(pattern)
  }

  translate(): string {
    const source = this.#alternatives()
    if (this.#at < this.#chars.length) throw this.#refuse('an unmatched )')
    return source
  }

  /** Everything up to the end or an unmatched `)`. */
  #alternatives(): string {
    let out = ''
    let openOptions = 0
    while (this.#at < this.#chars.length && this.#peek() !== ')') {
      if (this.#take('|')) {
        // An option such as (?i) holds to the end of its group, across alternatives.
        out += '|'
        continue
      }
      const option = this.#optionToGroupEnd()
      if (option !== undefined) {
        out += option
        openOptions++
        continue
      }
      out += this.#quantified(this.#atom())
    }
    return out + ')'.repeat(openOptions)
  }

  /** `(?i)` and its kin: Ruby applies them to all that follows in the group. */
  #optionToGroupEnd(): string | undefined {
    const rest = this.#chars.slice(this.#at, this.#at + 4).join('')
    if (rest !== '(?i)') return undefined
    this.#at += 4
    return '(?i:'
  }

  #atom(): string {
    const char = this.#next()
    switch (char) {
      case '(':
        return this.#group()
      case '[':
        return this.#bracket()
      case '\\':
        return this.#escape()
      case '.':
        return '[^\\n]'
      case '^':
        return '(?:(?<![^])|(?<=\\n)(?=[^]))'
      case '$':
        return '(?![^\\n])'
      case '*':
      case '+':
      case '?':
        throw this.#refuse(`a ${char} that repeats nothing`)
      default:
        return literal(char)
    }
  }

  #group(): string {
    const opening = this.#groupOpening()
    const inner = this.#alternatives()
    if (!this.#take(')')) throw this.#refuse('an unclosed group')
    return opening === 'atomic' ? this.#atomic(inner) : `${opening}${inner})`
  }

  #groupOpening(): string {
    // No pattern refers back to a group, so that captures need not be kept.
    if (!this.#take('?')) return '(?:'
    for (const plain of [':', '=', '!', '<=', '<!']) {
      if (this.#takeAll(plain)) return `(?${plain}`
    }
    if (this.#takeAll('>')) return 'atomic'
    if (this.#takeAll('i:')) return '(?i:'
    if (this.#takeAll('-i:')) return '(?-i:'
    throw this.#refuse(`the group (?${this.#peek() ?? ''}`)
  }

  /** What `inner` matches first, never given back: JavaScript does not re-enter a lookahead. */
  #atomic(inner: string): string {
    const name = `atomic${this.#atomics++}`
    return `(?:(?=(?<${name}>${inner}))\\k<${name}>)`
  }

  #quantified(atom: string): string {
    let out = atom
    for (;;) {
      const quantifier = this.#quantifier()
      if (quantifier === undefined) return out
      const braces = quantifier.startsWith('{')
      if (this.#take('?')) out = `${out}${quantifier}?`
      // In Ruby's syntax {n,m}+ repeats the repetition; only ?+ *+ ++ are possessive.
      else if (!braces && this.#take('+')) out = this.#atomic(`${out}${quantifier}`)
      else out = `${out}${quantifier}`
      out = `(?:${out})`
    }
  }

  #quantifier(): string | undefined {
    const char = this.#peek()
    if (char === '*' || char === '+' || char === '?') return this.#next()
    if (char !== '{') return undefined
    const braces = /^\{(\d*)(,?)(\d*)\}/.exec(this.#chars.slice(this.#at, this.#at + 16).join(''))
    if (braces === null || (braces[1] === '' && braces[3] === '')) return undefined
    this.#at += braces[0].length
    return `{${braces[1] || '0'}${braces[2]}${braces[3]}}`
  }

  /** An escape outside of brackets. */
  #escape(): string {
    const char = this.#peek() ?? ''
    const set = this.#setEscape()
    if (set !== undefined) return set
    if (Object.hasOwn(PLACE_ESCAPES, char)) {
      this.#at++
      return PLACE_ESCAPES[char]!
    }
    return literal(this.#charEscape())
  }

  #setEscape(): string | undefined {
    const char = this.#peek() ?? ''
    if (Object.hasOwn(SET_ESCAPES, char)) {
      this.#at++
      return SET_ESCAPES[char]
    }
    if (char === 'p' || char === 'P') {
      this.#at++
      return this.#property(char === 'P')
    }
    return undefined
  }

  #property(negated: boolean): string {
    if (!this.#take('{')) throw this.#refuse('\\p without a name')
    if (this.#take('^')) negated = !negated
    let name = ''
    while (this.#peek() !== undefined && this.#peek() !== '}') name += this.#next()
    this.#at++
    for (const candidate of [name, `Script=${name}`]) {
      const source = `\\${negated ? 'P' : 'p'}{${candidate}}`
      try {
        new RegExp(source, 'v')
        return source
      } catch {
        // Not a category: perhaps a script.
      }
    }
    throw this.#refuse(`the property \\p{${name}}`)
  }

  /** An escape that stands for one character. */
  #charEscape(): string {
    const char = this.#next()
    if (char === 'x' || char === 'u') return this.#hexEscape(char)
    if (Object.hasOwn(CONTROL_ESCAPES, char)) return String.fromCharCode(CONTROL_ESCAPES[char]!)
    if (/^[\p{L}\p{N}]$/v.test(char)) throw this.#refuse(`the escape \\${char}`)
    return char
  }

  #hexEscape(kind: 'x' | 'u'): string {
    const rest = this.#chars.slice(this.#at, this.#at + 10).join('')
    const form =
      kind === 'u' ? /^([0-9A-Fa-f]{4})/ : /^(?:\{([0-9A-Fa-f]{1,6})\}|([0-7][0-9A-Fa-f]))/
    const match = form.exec(rest)
    if (match === null) throw this.#refuse(`the escape \\${kind}${rest.slice(0, 4)}`)
    this.#at += match[0].length
    return String.fromCodePoint(Number.parseInt(match[1] ?? match[2]!, 16))
  }

  /** A bracket expression, its `[` already taken. */
  #bracket(): string {
    const negated = this.#take('^')
    const operands: string[] = []
    let items = ''
    // A ] that comes first is a plain character.
    if (this.#peek() === ']') items += literal(this.#next())
    for (;;) {
      const char = this.#peek()
      if (char === undefined) throw this.#refuse('an unclosed [')
      if (char === ']') break
      if (this.#takeAll('&&')) {
        operands.push(items)
        items = ''
      } else {
        items += this.#bracketItem()
      }
    }
    this.#at++
    operands.push(items)
    const inner = operands.length === 1 ? items : operands.map((one) => `[${one}]`).join('&&')
    return `[${negated ? '^' : ''}${inner}]`
  }

  #bracketItem(): string {
    const char = this.#next()
    if (char === '[') {
      if (this.#peek() === ':') throw this.#refuse('a POSIX bracket [: :]')
      return this.#bracket()
    }
    let first = char
    if (char === '\\') {
      const set = this.#setEscape()
      if (set !== undefined) return set
      first = this.#peek() === 'b' ? '\b' : ''
      if (first === '') first = this.#charEscape()
      else this.#at++
    }
    const range = this.#peek() === '-' && ![']', '[', undefined].includes(this.#chars[this.#at + 1])
    if (!range) return literal(first)
    this.#at++
    let last = this.#next()
    if (last === '\\') {
      if (this.#setEscape() !== undefined) throw this.#refuse('a range that ends in a set')
      last = this.#charEscape()
    }
    return `${literal(first)}-${literal(last)}`
  }

  #peek(): string | undefined {
    return this.#chars[this.#at]
  }

  #next(): string {
    const char = this.#chars[this.#at++]
    if (char === undefined) throw this.#refuse('its end comes too early')
    return char
  }

  #take(char: string): boolean {
    if (this.#peek() !== char) return false
    this.#at++
    return true
  }

  #takeAll(text: string): boolean {
    if (!text.split('').every((char, i) => this.#chars[this.#at + i] === char)) return false
    this.#at += text.length
    return true
  }

  #refuse(why: string): LatticeError {
    return unsupported(this.#pattern, why)
  }
}
