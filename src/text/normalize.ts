// Owns the normalizers that a tokenizer.json may declare: functions from text to text.

import { LatticeError } from '../errors.ts'
import { compilePattern, literalPattern } from './regex.ts'
import { type Json, kindOf, list, object, optionalBoolean, text } from './json.ts'

export type Normalizer = (text: string) => string

/** Where there is none. */
export const asIs: Normalizer = (text) => text

const COMBINING = /\p{M}/gv
const SPACE_AT_START = /^\p{White_Space}+/v
const SPACE_AT_END = /\p{White_Space}$/v

/**
 * @param json the `normalizer` of a tokenizer.json, or null
 * @throws LatticeError `model_unsupported` for a kind that is not known
 */
export function readNormalizer(json: Json): Normalizer {
  if (json === null || json === undefined) return asIs
  const at = 'normalizer'
  const node = object(json, at)
  const kind = kindOf(node, at)
  switch (kind) {
    case 'Sequence': {
      const steps = list(node['normalizers'], `${at}.normalizers`).map(readNormalizer)
      return (input) => steps.reduce((before, step) => step(before), input)
    }
    case 'NFC':
    case 'NFD':
    case 'NFKC':
    case 'NFKD':
      return (input) => input.normalize(kind)
    case 'Lowercase':
      // Character by character: a final sigma has no special form here.
      return (input) => Array.from(input, (char) => char.toLowerCase()).join('')
    case 'Strip':
      return strip(
        optionalBoolean(node['strip_left'], true, `${at}.strip_left`),
        optionalBoolean(node['strip_right'], true, `${at}.strip_right`),
      )
    case 'StripAccents':
      return (input) => input.replace(COMBINING, '')
    case 'Replace': {
      const pattern = readPattern(node['pattern'], `${at}.pattern`)
      const content = text(node['content'], `${at}.content`)
      return (input) => input.replace(pattern, () => content)
    }
    case 'Prepend': {
      const prefix = text(node['prepend'], `${at}.prepend`)
      return (input) => (input === '' ? '' : prefix + input)
    }
    default:
      throw new LatticeError('model_unsupported', `The normalizer "${kind}" is not supported.`, {
        todo: 'Use a GGUF file of the model if there is one.',
      })
  }
}

/** `{ "String": … }` or `{ "Regex": … }`, as a pattern with the g flag. */
export function readPattern(json: Json, at: string): RegExp {
  const node = object(json, at)
  if (node['String'] !== undefined) return literalPattern(text(node['String'], `${at}.String`))
  return compilePattern(text(node['Regex'], `${at}.Regex`))
}

function strip(left: boolean, right: boolean): Normalizer {
  return (input) => {
    let out = left ? input.replace(SPACE_AT_START, '') : input
    if (right) while (SPACE_AT_END.test(out.slice(-1))) out = out.slice(0, -1)
    return out
  }
}
