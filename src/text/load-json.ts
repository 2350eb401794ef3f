// Owns building a tokenizer from a parsed tokenizer.json (Hugging Face's tokenizers library).

import { LatticeError } from '../errors.ts'
import { type AddedToken, AddedTokenMatcher } from './added-tokens.ts'
import { Bpe } from './bpe.ts'
import { endTokens } from './end-tokens.ts'
import { readDecoder } from './json-decoder.ts'
import { type JsonPreTokenizer, readPreTokenizer } from './json-pretokenizers.ts'
import {
  isTokenId,
  type Json,
  kindOf,
  list,
  number,
  object,
  optionalBoolean,
  optionalText,
  text,
  tokenId,
  wrong,
} from './json.ts'
import { PairTable } from './merger.ts'
import { readNormalizer } from './normalize.ts'
import { TextTokenizer } from './text-tokenizer.ts'
import type { Tokenizer } from './tokenizer.ts'
import { Unigram } from './unigram.ts'
import type { PieceModel } from './words.ts'

type Node = Readonly<Record<string, Json>>

/** What a model's other files say beside tokenizer.json. */
export interface NamedTokens {
  bos: string | undefined
  eos: string | undefined
  /** Ids that end a text. */
  ends: readonly number[]
}

/**
 * @throws LatticeError `tokenizer_invalid` for a field that is missing or of the wrong type,
 *   `model_unsupported` for a component that is not known: skipping one would change the tokens
 */
export function jsonTokenizer(json: Json, named: NamedTokens): Tokenizer {
  const file = object(json, 'tokenizer.json')
  const modelNode = object(file['model'], 'model')
  const preTokenizer = readPreTokenizer(file['pre_tokenizer'])
  const normalize = readNormalizer(file['normalizer'])
  const decoder = readDecoder(file['decoder'])
  const { ids, model } = readModel(modelNode, preTokenizer.pieces)
  const declared = readAddedTokens(file['added_tokens'])

  const tokens: (string | undefined)[] = []
  for (const [spelling, id] of ids) tokens[id] = spelling
  for (const token of declared) tokens[token.id] = token.content
  const idOf = (spelling: string | undefined): number | undefined =>
    spelling === undefined
      ? undefined
      : (declared.find(({ content }) => content === spelling)?.id ?? ids.get(spelling))

  const isSpecial = (id: number): boolean =>
    declared.some((token) => token.id === id && token.special)
  const eosTokens = endTokens(tokens, [idOf(named.eos), ...named.ends], isSpecial)
  // What ends a turn must not be typed by a user, even where the file forgot to say so.
  const added = declared.map((token) =>
    eosTokens.includes(token.id) ? { ...token, special: true } : token,
  )
  const addedIds = new Set(added.map(({ id }) => id))
  const special = new Set(added.filter((token) => token.special).map(({ id }) => id))
  const { prefix, suffix } = readPostProcessor(file['post_processor'])
  return new TextTokenizer({
    tokens,
    special,
    added: new AddedTokenMatcher(added.filter((token) => !token.normalized)),
    addedNormalized: new AddedTokenMatcher(
      added.filter((token) => token.normalized),
      normalize,
    ),
    normalize,
    preTokenize: preTokenizer.preTokenize,
    model,
    prefix,
    suffix,
    bosToken: idOf(named.bos) ?? prefix[0],
    eosTokens,
    bytesOf: (token, spelling) => decoder.bytesOf(spelling, addedIds.has(token)),
    stripsSpace: decoder.stripsSpace,
  })
}

function readModel(
  node: Node,
  pieces: JsonPreTokenizer['pieces'],
): { ids: Map<string, number>; model: PieceModel } {
  const kind = optionalText(node['type'], 'model.type') ?? (node['merges'] ? 'BPE' : 'none')
  if (kind === 'BPE') return readBpe(node, pieces)
  if (kind === 'Unigram' && pieces === 'text') return readUnigram(node)
  throw new LatticeError('model_unsupported', `The tokenizer model "${kind}" is not supported.`, {
    todo: 'Supported are BPE and Unigram (without a ByteLevel pre-tokenizer).',
  })
}

function readBpe(
  node: Node,
  pieces: JsonPreTokenizer['pieces'],
): { ids: Map<string, number>; model: PieceModel } {
  for (const field of ['dropout', 'continuing_subword_prefix', 'end_of_word_suffix']) {
    if (node[field]) {
      throw new LatticeError('model_unsupported', `model.${field} of BPE is not supported.`, {
        todo: 'Use a GGUF file of the model if there is one.',
      })
    }
  }
  const ids = readVocabulary(object(node['vocab'], 'model.vocab'))
  const unknownSpelling = optionalText(node['unk_token'], 'model.unk_token')
  const unknown = unknownSpelling === undefined ? undefined : ids.get(unknownSpelling)
  if (unknownSpelling !== undefined && unknown === undefined) {
    throw wrong('model.unk_token', 'in model.vocab', unknownSpelling)
  }
  const model = new Bpe({
    ids,
    merges: readMerges(list(node['merges'], 'model.merges'), ids),
    alphabet: pieces === 'bytes' ? 'bytes' : 'characters',
    byteFallback: optionalBoolean(node['byte_fallback'], false, 'model.byte_fallback'),
    unknown,
    fuseUnknown: optionalBoolean(node['fuse_unk'], false, 'model.fuse_unk'),
    wholePieces: optionalBoolean(node['ignore_merges'], false, 'model.ignore_merges'),
  })
  return { ids, model }
}

/** A vocabulary may have 262,144 entries: the loop makes nothing but the map. */
function readVocabulary(vocab: Node): Map<string, number> {
  const ids = new Map<string, number>()
  for (const spelling in vocab) {
    const id = vocab[spelling]
    if (!isTokenId(id)) throw wrong(`model.vocab[${JSON.stringify(spelling)}]`, 'a token id', id)
    ids.set(spelling, id)
  }
  return ids
}

/** Each merge is `"a b"`, or `["a", "b"]` since spaces were allowed in entries. */
function readMerges(merges: readonly Json[], ids: ReadonlyMap<string, number>): PairTable {
  const table = new PairTable(merges.length)
  for (let rank = 0; rank < merges.length; rank++) {
    const merge = merges[rank]
    const pair: unknown = typeof merge === 'string' ? merge.split(' ') : merge
    if (!isPair(pair)) throw wrong(`model.merges[${rank}]`, 'a pair of strings', merge)
    const left = ids.get(pair[0])
    const right = ids.get(pair[1])
    const merged = ids.get(pair[0] + pair[1])
    if (left === undefined || right === undefined || merged === undefined) {
      throw wrong(`model.merges[${rank}]`, 'made of entries of model.vocab', merge)
    }
    table.set(left, right, rank, merged)
  }
  return table
}

function isPair(value: unknown): value is [string, string] {
  return (
    Array.isArray(value) &&
    value.length === 2 &&
    typeof value[0] === 'string' &&
    typeof value[1] === 'string'
  )
}

function readUnigram(node: Node): { ids: Map<string, number>; model: PieceModel } {
  const pieces = list(node['vocab'], 'model.vocab').map((entry, id): [string, number] => {
    const [spelling, score] = list(entry, `model.vocab[${id}]`)
    return [text(spelling, `model.vocab[${id}][0]`), number(score, `model.vocab[${id}][1]`)]
  })
  const given = node['unk_id']
  const unknown = given === undefined || given === null ? undefined : tokenId(given, 'model.unk_id')
  if (unknown !== undefined && unknown >= pieces.length) {
    throw wrong('model.unk_id', `less than ${pieces.length}`, unknown)
  }
  const byteFallback = optionalBoolean(node['byte_fallback'], false, 'model.byte_fallback')
  const ids = new Map(pieces.map(([spelling], id) => [spelling, id]))
  return { ids, model: new Unigram({ pieces, unknown, byteFallback }) }
}

function readAddedTokens(json: Json): AddedToken[] {
  if (json === undefined || json === null) return []
  return list(json, 'added_tokens').map((entry, index) => {
    const at = `added_tokens[${index}]`
    const node = object(entry, at)
    const flag = (name: string, fallback: boolean): boolean =>
      optionalBoolean(node[name], fallback, `${at}.${name}`)
    const special = flag('special', false)
    return {
      id: tokenId(node['id'], `${at}.id`),
      content: text(node['content'], `${at}.content`),
      special,
      singleWord: flag('single_word', false),
      lstrip: flag('lstrip', false),
      rstrip: flag('rstrip', false),
      normalized: flag('normalized', !special),
    }
  })
}

interface Frame {
  prefix: number[]
  suffix: number[]
}

/** The tokens put before and after a single text. */
function readPostProcessor(json: Json): Frame {
  if (json === null || json === undefined) return { prefix: [], suffix: [] }
  const at = 'post_processor'
  const node = object(json, at)
  const kind = kindOf(node, at)
  switch (kind) {
    case 'ByteLevel':
      return { prefix: [], suffix: [] }
    case 'Sequence': {
      const inner = list(node['processors'], `${at}.processors`).map(readPostProcessor)
      return {
        prefix: inner.toReversed().flatMap(({ prefix }) => prefix),
        suffix: inner.flatMap(({ suffix }) => suffix),
      }
    }
    case 'TemplateProcessing':
      return readTemplate(node, at)
    case 'BertProcessing':
    case 'RobertaProcessing':
      return {
        prefix: [tokenId(list(node['cls'], `${at}.cls`)[1], `${at}.cls[1]`)],
        suffix: [tokenId(list(node['sep'], `${at}.sep`)[1], `${at}.sep[1]`)],
      }
    default:
      throw new LatticeError(
        'model_unsupported',
        `The post-processor "${kind}" is not supported.`,
        {
          todo: 'Use a GGUF file of the model if there is one.',
        },
      )
  }
}

function readTemplate(node: Node, at: string): Frame {
  const frame: Frame = { prefix: [], suffix: [] }
  const specials = object(node['special_tokens'] ?? {}, `${at}.special_tokens`)
  let before = true
  for (const part of list(node['single'], `${at}.single`)) {
    const piece = object(part, `${at}.single`)
    if (piece['Sequence'] !== undefined) {
      before = false
      continue
    }
    const name = text(object(piece['SpecialToken'], `${at}.single`)['id'], `${at}.single`)
    const where = `${at}.special_tokens[${JSON.stringify(name)}]`
    for (const id of list(object(specials[name], where)['ids'], `${where}.ids`)) {
      ;(before ? frame.prefix : frame.suffix).push(tokenId(id, `${where}.ids`))
    }
  }
  return frame
}
