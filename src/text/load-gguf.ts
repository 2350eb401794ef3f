// Owns building a tokenizer from the `tokenizer.ggml.*` metadata of a GGUF file.

import { LatticeError } from '../errors.ts'
import type { MetadataValue } from '../model/model.ts'
import { type AddedToken, AddedTokenMatcher } from './added-tokens.ts'
import { Bpe, entryByte } from './bpe.ts'
import { spelledBytes } from './byte-alphabet.ts'
import { endTokens } from './end-tokens.ts'
import { preTokenizerFamily } from './gguf-pretokenizers.ts'
import { PairTable } from './merger.ts'
import { asIs } from './normalize.ts'
import { byteTokensOf, Spm } from './spm.ts'
import { TextTokenizer } from './text-tokenizer.ts'
import type { Tokenizer } from './tokenizer.ts'
import { META_SPACE } from './words.ts'

type Metadata = ReadonlyMap<string, MetadataValue>

/** `tokenizer.ggml.token_type`. */
const Kind = { normal: 1, unknown: 2, control: 3, user: 4, unused: 5, byte: 6 } as const

interface Vocabulary {
  tokens: readonly string[]
  kinds: ArrayLike<number>
  special: ReadonlySet<number>
  /** Entries that encoding may reach by merging: never a special token, whatever a user types. */
  entries: ReadonlyMap<string, number>
}

/**
 * @throws LatticeError `tokenizer_invalid` for a key that is missing or of the wrong type,
 *   `model_unsupported` for a model or pre-tokenizer that is not known
 */
export function ggufTokenizer(metadata: Metadata): Tokenizer {
  const model = string(metadata, 'model')
  switch (model) {
    case 'gpt2':
      return bytePairTokenizer(metadata)
    case 'llama':
      return sentencePieceTokenizer(metadata)
    default:
      throw new LatticeError(
        'model_unsupported',
        `The tokenizer model "${model}" (tokenizer.ggml.model) is not supported.`,
        { todo: 'Supported are gpt2 (byte-level BPE) and llama (SentencePiece).' },
      )
  }
}

function bytePairTokenizer(metadata: Metadata): Tokenizer {
  const vocabulary = readVocabulary(metadata)
  const { tokens, kinds, special, entries } = vocabulary
  const family = preTokenizerFamily(optionalString(metadata, 'pre'))
  const form = family.normalization
  return new TextTokenizer({
    tokens,
    special,
    added: addedTokens(vocabulary, 'all'),
    addedNormalized: undefined,
    normalize: form === undefined ? asIs : (text) => text.normalize(form),
    preTokenize: family.preTokenize,
    model: new Bpe({
      ids: entries,
      merges: readMerges(strings(metadata, 'merges'), entries),
      alphabet: family.spelled === true ? 'characters' : 'bytes',
      byteFallback: false,
      unknown: undefined,
      fuseUnknown: false,
      wholePieces: family.wholePieces ?? false,
    }),
    ...frame(metadata, vocabulary, {
      addBos: family.addBos ?? false,
      bos: undefined,
      eos: undefined,
    }),
    bytesOf: (token, spelling) =>
      (kinds[token] === Kind.normal ? spelledBytes(spelling) : undefined) ??
      Buffer.from(spelling, 'utf8'),
    stripsSpace: false,
  })
}

function sentencePieceTokenizer(metadata: Metadata): Tokenizer {
  for (const key of ['remove_extra_whitespaces', 'precompiled_charsmap']) {
    const value = metadata.get(`tokenizer.ggml.${key}`)
    if (value === undefined || value === false) continue
    throw new LatticeError('model_unsupported', `tokenizer.ggml.${key} is not supported.`, {
      todo: 'Use a safetensors directory of the model, whose tokenizer.json says the same.',
    })
  }
  const vocabulary = readVocabulary(metadata)
  const { tokens, kinds, special, entries } = vocabulary
  const scores = metadata.get('tokenizer.ggml.scores')
  if (!(scores instanceof Float32Array) || scores.length !== tokens.length) {
    throw invalid('scores', `should be ${tokens.length} floats`)
  }
  const bytes = new Map<string, number>()
  const unused = new Set<number>()
  tokens.forEach((spelling, token) => {
    if (kinds[token] === Kind.byte) bytes.set(spelling, token)
    if (kinds[token] === Kind.unused) unused.add(token)
  })
  const addsSpace = boolean(metadata, 'add_space_prefix') ?? true
  const unknown = optionalToken(metadata, 'unknown_token_id', tokens) ?? 0
  return new TextTokenizer({
    tokens,
    special,
    // SentencePiece looks for user-defined symbols once spaces are U+2581. Where a space is put
    // before text, one follows each of them too (as fine-tuned Llama 2 models have been trained).
    added: addedTokens(vocabulary, addsSpace ? 'all' : 'special'),
    addedNormalized: addsSpace ? undefined : addedTokens(vocabulary, 'user', metaSpaced),
    normalize: addsSpace ? (text) => metaSpaced(` ${text}`) : metaSpaced,
    preTokenize: (pieces) => pieces,
    model: new Spm({
      pieces: entries,
      scores,
      vocabSize: tokens.length,
      unused,
      byteTokens: byteTokensOf(bytes),
      unknown,
    }),
    ...frame(metadata, vocabulary, { addBos: true, bos: 1, eos: 2 }),
    bytesOf: (token, spelling) => {
      const byte = kinds[token] === Kind.byte ? entryByte(spelling) : undefined
      if (byte !== undefined) return Uint8Array.of(byte)
      const plain = kinds[token] === Kind.normal || kinds[token] === Kind.unused
      return Buffer.from(plain ? spelling.replaceAll(META_SPACE, ' ') : spelling, 'utf8')
    },
    stripsSpace: addsSpace,
  })
}

function readVocabulary(metadata: Metadata): Vocabulary {
  const tokens = strings(metadata, 'tokens')
  const isSentencePiece = metadata.get('tokenizer.ggml.model') === 'llama'
  const kinds = readKinds(metadata, tokens)
  const special = new Set<number>()
  const entries = new Map<string, number>()
  for (let token = 0; token < tokens.length; token++) {
    const kind = kinds[token]
    if (kind === Kind.control || kind === Kind.unknown) special.add(token)
    // In SentencePiece user-defined symbols are matched first and never merged.
    else if (kind === Kind.normal || kind === Kind.unused) entries.set(tokens[token]!, token)
    else if (kind === Kind.user && !isSentencePiece) entries.set(tokens[token]!, token)
  }
  return { tokens, kinds, special, entries }
}

function readKinds(metadata: Metadata, tokens: readonly string[]): Int32Array {
  const kinds = givenKinds(metadata, tokens)
  for (let token = 0; token < kinds.length; token++) {
    // Converters fill holes with this text; it is nobody's token.
    if (kinds[token] === Kind.user && tokens[token] === `[PAD${token}]`) kinds[token] = Kind.unused
  }
  // Some converters leave the tokens that end a turn as normal ones.
  const isControl = (token: number): boolean => kinds[token] === Kind.control
  for (const token of endTokens(tokens, [], isControl)) kinds[token] = Kind.control
  return kinds
}

function givenKinds(metadata: Metadata, tokens: readonly string[]): Int32Array {
  const given = metadata.get('tokenizer.ggml.token_type')
  if (given === undefined) return new Int32Array(tokens.length).fill(Kind.normal)
  if (!(given instanceof Int32Array || given instanceof Uint32Array)) {
    throw invalid('token_type', 'should be an array of 32-bit integers')
  }
  if (given.length !== tokens.length) {
    throw invalid('token_type', `has ${given.length} entries for ${tokens.length} tokens`)
  }
  return Int32Array.from(given)
}

const metaSpaced = (text: string): string => text.replaceAll(' ', META_SPACE)

/** Control tokens are special; user-defined ones are found whoever typed them. */
function addedTokens(
  { tokens, kinds, special }: Vocabulary,
  which: 'all' | 'special' | 'user',
  spelling?: (content: string) => string,
): AddedTokenMatcher {
  const added: AddedToken[] = []
  tokens.forEach((content, id) => {
    if (special.has(id) ? which === 'user' : kinds[id] !== Kind.user || which === 'special') return
    added.push({
      id,
      content,
      special: special.has(id),
      singleWord: false,
      lstrip: false,
      rstrip: false,
      normalized: false,
    })
  })
  return new AddedTokenMatcher(added, spelling)
}

function readMerges(merges: readonly string[], entries: ReadonlyMap<string, number>): PairTable {
  const table = new PairTable(merges.length)
  for (let rank = 0; rank < merges.length; rank++) {
    const merge = merges[rank]!
    // The left part is not empty, and may itself begin with a space.
    const space = merge.indexOf(' ', 1)
    const left = merge.slice(0, space)
    const right = merge.slice(space + 1)
    const leftToken = entries.get(left)
    const rightToken = entries.get(right)
    const merged = entries.get(left + right)
    if (leftToken === undefined || rightToken === undefined || merged === undefined) {
      throw invalid('merges', `has "${merge}" at ${rank}, which the vocabulary lacks`)
    }
    if (table.find(leftToken, rightToken) < 0) table.set(leftToken, rightToken, rank, merged)
  }
  return table
}

/** What begins and ends a text, and what may end one. */
function frame(
  metadata: Metadata,
  { tokens, special }: Vocabulary,
  defaults: { addBos: boolean; bos: number | undefined; eos: number | undefined },
): { prefix: number[]; suffix: number[]; bosToken: number | undefined; eosTokens: number[] } {
  const bosToken = optionalToken(metadata, 'bos_token_id', tokens) ?? defaults.bos
  const eosToken = optionalToken(metadata, 'eos_token_id', tokens) ?? defaults.eos
  const addBos = boolean(metadata, 'add_bos_token') ?? defaults.addBos
  const addEos = boolean(metadata, 'add_eos_token') ?? false
  if (addBos && bosToken === undefined) throw invalid('bos_token_id', 'is missing, to be added')
  if (addEos && eosToken === undefined) throw invalid('eos_token_id', 'is missing, to be added')
  const named = ['eot_token_id', 'eom_token_id'].map((key) => optionalToken(metadata, key, tokens))
  return {
    prefix: addBos ? [bosToken!] : [],
    suffix: addEos ? [eosToken!] : [],
    bosToken,
    eosTokens: endTokens(tokens, [eosToken, ...named], (token) => special.has(token)),
  }
}

function string(metadata: Metadata, key: string): string {
  const value = optionalString(metadata, key)
  if (value === undefined) throw invalid(key, 'is missing')
  return value
}

function optionalString(metadata: Metadata, key: string): string | undefined {
  const value = metadata.get(`tokenizer.ggml.${key}`)
  if (value === undefined || typeof value === 'string') return value
  throw invalid(key, 'should be a string')
}

function strings(metadata: Metadata, key: string): readonly string[] {
  const value = metadata.get(`tokenizer.ggml.${key}`)
  if (Array.isArray(value) && value.every((one) => typeof one === 'string')) {
    return value as string[]
  }
  throw invalid(key, value === undefined ? 'is missing' : 'should be an array of strings')
}

function boolean(metadata: Metadata, key: string): boolean | undefined {
  const value = metadata.get(`tokenizer.ggml.${key}`)
  if (value === undefined || typeof value === 'boolean') return value
  throw invalid(key, 'should be true or false')
}

function optionalToken(
  metadata: Metadata,
  key: string,
  tokens: readonly string[],
): number | undefined {
  const value = metadata.get(`tokenizer.ggml.${key}`)
  if (value === undefined) return undefined
  if (typeof value === 'number' && value >= 0 && value < tokens.length) return value
  throw invalid(key, `is not one of the ${tokens.length} tokens`)
}

function invalid(key: string, why: string): LatticeError {
  return new LatticeError('tokenizer_invalid', `tokenizer.ggml.${key} ${why}.`, {
    todo: 'The GGUF file is damaged or was converted wrongly; fetch it again.',
    details: { field: `tokenizer.ggml.${key}` },
  })
}
