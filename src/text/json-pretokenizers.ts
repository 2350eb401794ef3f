// Owns reading the `pre_tokenizer` of a tokenizer.json.

import { LatticeError } from '../errors.ts'
import { type Json, kindOf, list, object, oneOf, optionalBoolean, optionalText } from './json.ts'
import { KNOWN_PATTERNS } from './gguf-pretokenizers.ts'
import { readPattern } from './normalize.ts'
import {
  atWords,
  byteSpelling,
  digits,
  gpt2Words,
  inSequence,
  metaspace,
  type PreTokenizer,
  prefixSpace,
  punctuation,
  split,
  whitespace,
  whitespaceSplit,
} from './pretokenize.ts'
import { META_SPACE } from './words.ts'

const BEHAVIORS = [
  'Removed',
  'Isolated',
  'MergedWithPrevious',
  'MergedWithNext',
  'Contiguous',
] as const

export interface JsonPreTokenizer {
  preTokenize: PreTokenizer
  /**
   * How the model sees a piece: as text, or as bytes in the byte alphabet; spelled out already
   * where a step after ByteLevel had to see the spelling.
   */
  pieces: 'text' | 'bytes' | 'spelled'
}

/**
 * @param json the field's value, or null
 * @throws LatticeError `model_unsupported` for a kind that is not known
 */
export function readPreTokenizer(json: Json): JsonPreTokenizer {
  const components = flatten(json, 'pre_tokenizer')
  const steps: PreTokenizer[] = []
  let pieces: JsonPreTokenizer['pieces'] = 'text'
  components.forEach((node) => {
    if (pieces === 'bytes') {
      steps.push(byteSpelling)
      pieces = 'spelled'
    }
    steps.push(...readStep(node))
    if (node['type'] !== 'ByteLevel') return
    if (pieces === 'spelled') throw unsupported('a second ByteLevel')
    pieces = 'bytes'
  })
  return { preTokenize: inSequence(steps), pieces }
}

function flatten(json: Json, at: string): Readonly<Record<string, Json>>[] {
  if (json === null || json === undefined) return []
  const node = object(json, at)
  if (node['type'] !== 'Sequence') return [node]
  return list(node['pretokenizers'], `${at}.pretokenizers`).flatMap((inner) => flatten(inner, at))
}

function readStep(node: Readonly<Record<string, Json>>): PreTokenizer[] {
  const at = 'pre_tokenizer'
  const kind = kindOf(node, at)
  switch (kind) {
    case 'ByteLevel': {
      const prefix = optionalBoolean(node['add_prefix_space'], true, `${at}.add_prefix_space`)
      const words = optionalBoolean(node['use_regex'], true, `${at}.use_regex`)
      return [...(prefix ? [prefixSpace] : []), ...(words ? [gpt2Words] : [])]
    }
    case 'Split':
      return [readSplit(node, at)]
    case 'Digits':
      return [digits(optionalBoolean(node['individual_digits'], false, `${at}.individual_digits`))]
    case 'Punctuation':
      return [punctuation(oneOf(node['behavior'] ?? 'Isolated', BEHAVIORS, `${at}.behavior`))]
    case 'Whitespace':
      return [whitespace]
    case 'WhitespaceSplit':
      return [whitespaceSplit]
    case 'Metaspace':
      return [readMetaspace(node, at)]
    default:
      throw unsupported(`"${kind}"`)
  }
}

function readSplit(node: Readonly<Record<string, Json>>, at: string): PreTokenizer {
  const pattern = readPattern(node['pattern'], `${at}.pattern`)
  const behavior = oneOf(node['behavior'], BEHAVIORS, `${at}.behavior`)
  const invert = optionalBoolean(node['invert'], false, `${at}.invert`)
  const step = split(pattern, behavior, invert)
  const source = optionalText(object(node['pattern'], at)['Regex'], at) ?? ''
  const known = behavior === 'Isolated' ? KNOWN_PATTERNS.get(source) : undefined
  return known ? atWords(known, step) : step
}

function readMetaspace(node: Readonly<Record<string, Json>>, at: string): PreTokenizer {
  const replacement = optionalText(node['replacement'], `${at}.replacement`) ?? META_SPACE
  return metaspace(
    replacement,
    readPrependScheme(node, at),
    optionalBoolean(node['split'], true, `${at}.split`),
  )
}

/** The field's own name, or the older `add_prefix_space`. */
export function readPrependScheme(
  node: Readonly<Record<string, Json>>,
  at: string,
): 'always' | 'first' | 'never' {
  const older = optionalBoolean(node['add_prefix_space'], true, `${at}.add_prefix_space`)
  const fallback = older ? 'always' : 'never'
  const names = ['always', 'first', 'never'] as const
  return oneOf(node['prepend_scheme'] ?? fallback, names, `${at}.prepend_scheme`)
}

function unsupported(what: string): LatticeError {
  return new LatticeError('model_unsupported', `The pre-tokenizer ${what} is not supported.`, {
    todo: 'Use a GGUF file of the model if there is one.',
  })
}
