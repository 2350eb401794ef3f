// Owns reading the `decoder` of a tokenizer.json: what bytes each spelling stands for.

import { LatticeError } from '../errors.ts'
import { entryByte } from './bpe.ts'
import { spelledBytes } from './byte-alphabet.ts'
import { readPrependScheme } from './json-pretokenizers.ts'
import { type Json, kindOf, list, number, object, optionalText, text } from './json.ts'
import { readPattern } from './normalize.ts'
import { META_SPACE } from './words.ts'

export interface JsonDecoder {
  bytesOf: (spelling: string, isAdded: boolean) => Uint8Array
  /** One space at the start of a whole text goes. */
  stripsSpace: boolean
}

interface Steps {
  byteLevel: boolean
  byteFallback: boolean
  stripsSpace: boolean
  respell: ((spelling: string) => string)[]
}

/** @throws LatticeError `model_unsupported` for a kind that is not known */
export function readDecoder(json: Json): JsonDecoder {
  if (json === null || json === undefined) throw unsupported('null')
  const steps: Steps = { byteLevel: false, byteFallback: false, stripsSpace: false, respell: [] }
  readStep(json, steps)
  const { byteLevel, byteFallback, stripsSpace, respell } = steps
  const bytesOf = (spelling: string, isAdded: boolean): Uint8Array => {
    // An added token is plain text, not spelled in the byte alphabet.
    if (byteLevel) {
      return (isAdded ? undefined : spelledBytes(spelling)) ?? Buffer.from(spelling, 'utf8')
    }
    const plain = respell.reduce((before, step) => step(before), spelling)
    const byte = byteFallback ? entryByte(plain) : undefined
    return byte === undefined ? Buffer.from(plain, 'utf8') : Uint8Array.of(byte)
  }
  return { bytesOf, stripsSpace }
}

function readStep(json: Json, steps: Steps): void {
  const at = 'decoder'
  const node = object(json, at)
  const kind = kindOf(node, at)
  switch (kind) {
    case 'Sequence':
      for (const inner of list(node['decoders'], `${at}.decoders`)) readStep(inner, steps)
      return
    case 'ByteLevel':
      steps.byteLevel = true
      return
    case 'ByteFallback':
      steps.byteFallback = true
      return
    case 'Fuse':
      return
    case 'Replace': {
      const pattern = readPattern(node['pattern'], `${at}.pattern`)
      const content = text(node['content'], `${at}.content`)
      steps.respell.push((spelling) => spelling.replace(pattern, () => content))
      return
    }
    case 'Metaspace': {
      const replacement = optionalText(node['replacement'], `${at}.replacement`) ?? META_SPACE
      steps.respell.push((spelling) => spelling.replaceAll(replacement, ' '))
      steps.stripsSpace = readPrependScheme(node, at) !== 'never'
      return
    }
    case 'Strip': {
      const start = number(node['start'], `${at}.start`)
      const stop = number(node['stop'], `${at}.stop`)
      if (node['content'] !== ' ' || start > 1 || stop !== 0)
        throw unsupported('Strip of this kind')
      steps.stripsSpace = start === 1
      return
    }
    default:
      throw unsupported(`"${kind}"`)
  }
}

function unsupported(what: string): LatticeError {
  return new LatticeError('model_unsupported', `The decoder ${what} is not supported.`, {
    todo: 'Use a GGUF file of the model if there is one.',
  })
}
