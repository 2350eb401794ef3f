// Owns the meaning of GGUF's `tokenizer.ggml.pre`: for each name, how that family's authors cut
// text in their own tokenizer (their tokenizer.json or tiktoken pattern).

import { LatticeError } from '../errors.ts'
import {
  type AtWords,
  atWords,
  byteSpelling,
  digits,
  gpt2Words,
  inSequence,
  type PreTokenizer,
  punctuation,
  split,
} from './pretokenize.ts'
import { compilePattern } from './regex.ts'

export interface PreTokenizerFamily {
  preTokenize: PreTokenizer
  /** Pieces come out spelled in the byte alphabet already. */
  spelled?: boolean
  /** The authors compose text first (Unicode NFC). */
  normalization?: 'NFC'
  /** A piece that is a vocabulary entry is one token, whatever the merges say. */
  wholePieces?: boolean
  /** Begin-of-sequence is added unless the metadata says otherwise. */
  addBos?: boolean
}

/** Cuts out what matches nowhere near the beginning of a word: numbers, punctuation, ideographs. */
const pattern = (source: string): PreTokenizer => atWords('passes', split(compilePattern(source)))
/** Cuts words. */
const words = (source: string): PreTokenizer => atWords('cuts', split(compilePattern(source)))

const CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
const SPACES = String.raw`\s*[\r\n]+|\s+(?!\S)|\s+`

/** Words as GPT-4 has them, with `numbers` for digits: Llama 3 takes three, Qwen 2 one by one. */
const gpt4 = (numbers: string, letters = String.raw`\p{L}`, contractions = CONTRACTIONS): string =>
  [
    contractions,
    String.raw`[^\r\n\p{L}\p{N}]?${letters.length > 5 ? `[${letters}]` : letters}+`,
    numbers,
    String.raw` ?[^\s${letters}\p{N}]+[\r\n]*`,
    SPACES,
  ].join('|')

/** Words that end where lower case turns to upper: GPT-4o, and Tekken without contractions. */
const gpt4o = (numbers: string, contractions: string): string => {
  const upper = String.raw`[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]`
  const lower = String.raw`[\p{Ll}\p{Lm}\p{Lo}\p{M}]`
  return [
    String.raw`[^\r\n\p{L}\p{N}]?${upper}*${lower}+${contractions}`,
    String.raw`[^\r\n\p{L}\p{N}]?${upper}+${lower}*${contractions}`,
    numbers,
    String.raw` ?[^\s\p{L}\p{N}]+[\r\n/]*`,
    SPACES,
  ].join('|')
}

/** DeepSeek's cased letters: code points in hexadecimal, as its tokenizer.json lists them. */
const DEEPSEEK_LETTERS = letterClass(
  '41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f 386 ' +
    '388-38a 38c 38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd ' +
    '1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d ' +
    '1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 ' +
    '1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128 ' +
    '212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183 2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee ' +
    '2cf2 2cf3 a640-a66d a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ' +
    'ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 ' +
    '118a0-118df 1e900-1e943',
)
const DEEPSEEK_PUNCTUATION = letterClass('21-2f 3a-7e ff01-ff0f ff1a-ff5e 2018-201f 3000-3002')
const DEEPSEEK_CJK = letterClass('4e00-9fa5 800-4e00 ac00-d7ff')

function letterClass(ranges: string): string {
  const escape = (hex: string): string => `\\x{${hex}}`
  return `[${ranges
    .split(' ')
    .map((range) => range.split('-').map(escape).join('-'))
    .join('')}]`
}

const DEEPSEEK_V3_WORDS = [
  String.raw`[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_\x60{|}~][A-Za-z]+`,
  String.raw`[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+`,
  String.raw` ?[\p{P}\p{S}]+[\r\n]*`,
  SPACES,
].join('|')

/** What a tokenizer.json may say and this file knows too, by its pattern. */
export const KNOWN_PATTERNS: ReadonlyMap<string, AtWords> = new Map([
  [gpt4(String.raw`\p{N}{1,3}`), 'cuts'],
  [gpt4(String.raw`\p{N}`), 'cuts'],
  [gpt4(String.raw`\p{N}`, String.raw`\p{L}\p{M}`), 'cuts'],
  [gpt4o(String.raw`\p{N}{1,3}`, `${CONTRACTIONS}?`), 'cuts'],
  [gpt4o(String.raw`\p{N}`, ''), 'cuts'],
  [DEEPSEEK_V3_WORDS.replace('\\x60', '`'), 'cuts'],
  [String.raw`\p{N}{1,3}`, 'passes'],
  [String.raw`\p{N}`, 'passes'],
  [String.raw`[0-9][0-9][0-9]`, 'passes'],
  ['[一-龥\\x{3040}-ゟ゠-ヿ]+', 'passes'],
  ['[一-龥぀-ゟ゠-ヿ]+', 'passes'],
])

/** Families are built when asked for: compiling every pattern would cost each start. */
const FAMILIES: readonly {
  names: readonly string[]
  make: () => PreTokenizerFamily
}[] = [
  {
    // No family said: what llama.cpp has always done with such files.
    names: ['default'],
    make: () => ({
      preTokenize: inSequence([
        pattern(String.raw`[\p{P}\$\+<=>\^~\|]+`),
        gpt2Words,
        digits(false),
        pattern('[0-9][0-9][0-9]'),
      ]),
    }),
  },
  {
    names: [
      'gpt-2',
      'phi-2',
      'jais',
      'trillion',
      'granite-docling',
      'exaone4',
      'gigachat',
      'a.x-4.0',
      'mellum',
    ],
    make: () => ({ preTokenize: gpt2Words }),
  },
  {
    names: ['mpt', 'olmo'],
    make: () => ({ preTokenize: gpt2Words, normalization: 'NFC' }),
  },
  {
    names: ['smollm', 'starcoder', 'refact', 'codeshell', 'exaone', 'minerva-7b', 'mellum2'],
    make: () => ({ preTokenize: inSequence([digits(true), gpt2Words]) }),
  },
  {
    names: ['command-r'],
    make: () => ({
      preTokenize: inSequence([digits(true), gpt2Words]),
      normalization: 'NFC',
    }),
  },
  {
    names: [
      'llama3',
      'llama-v3',
      'llama-bpe',
      'falcon3',
      'falcon-h1',
      'pixtral',
      'midm-2.0',
      'lfm2',
    ],
    make: () => ({
      preTokenize: words(gpt4(String.raw`\p{N}{1,3}`)),
      wholePieces: true,
      addBos: true,
    }),
  },
  {
    names: ['dbrx', 'smaug-bpe', 'glm4', 'chatglm-bpe'],
    make: () => ({ preTokenize: words(gpt4(String.raw`\p{N}{1,3}`)) }),
  },
  {
    names: ['qwen2'],
    make: () => ({ preTokenize: words(gpt4(String.raw`\p{N}`)), normalization: 'NFC' }),
  },
  {
    names: ['qwen35'],
    make: () => ({
      preTokenize: words(gpt4(String.raw`\p{N}`, String.raw`\p{L}\p{M}`)),
      normalization: 'NFC',
    }),
  },
  {
    names: ['deepseek-r1-qwen', 'stablelm2', 'hunyuan', 'megrez', 'grok-2', 'kormo', 'solar-open'],
    make: () => ({ preTokenize: words(gpt4(String.raw`\p{N}`)) }),
  },
  {
    names: ['deepseek-llm'],
    make: () => ({
      preTokenize: inSequence([
        pattern(String.raw`[\r\n]`),
        split(compilePattern(String.raw`\s?${DEEPSEEK_LETTERS}+`)),
        pattern(String.raw`\s?${DEEPSEEK_PUNCTUATION}+`),
        // Theirs is \s+$, quadratic in a run of spaces; pieces hold no line ends, so this is it.
        pattern(String.raw`(?<!\s)\s+\z`),
        pattern(`${DEEPSEEK_CJK}+`),
        digits(true),
      ]),
    }),
  },
  {
    names: ['deepseek-coder'],
    make: () => ({
      preTokenize: inSequence([
        pattern(String.raw`[\r\n]`),
        split(compilePattern(String.raw`\s?\p{L}+`)),
        pattern(String.raw`\s?\p{P}+`),
        pattern(`${DEEPSEEK_CJK}+`),
        digits(true),
      ]),
    }),
  },
  {
    names: ['deepseek-v3', 'hunyuan-dense', 'joyai-llm'],
    make: () => ({
      preTokenize: inSequence([
        pattern(String.raw`\p{N}{1,3}`),
        pattern(String.raw`[\x{4e00}-\x{9fa5}\x{3040}-\x{309f}\x{30a0}-\x{30ff}]+`),
        words(DEEPSEEK_V3_WORDS),
      ]),
    }),
  },
  {
    names: ['falcon'],
    make: () => ({
      preTokenize: inSequence([
        punctuation('Contiguous'),
        gpt2Words,
        byteSpelling,
        digits(false),
        pattern('[0-9][0-9][0-9]'),
      ]),
      spelled: true,
    }),
  },
  {
    names: ['tekken'],
    make: () => ({
      preTokenize: words(gpt4o(String.raw`\p{N}`, '')),
      wholePieces: true,
      addBos: true,
    }),
  },
  {
    names: ['gpt-4o', 'llama4', 'kanana2', 'minimax-m2'],
    make: () => ({
      preTokenize: words(gpt4o(String.raw`\p{N}{1,3}`, `${CONTRACTIONS}?`)),
      wholePieces: true,
    }),
  },
  {
    names: ['seed-coder'],
    make: () => ({
      preTokenize: words(
        [
          CONTRACTIONS,
          String.raw`[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+`,
          SPACES,
        ].join('|'),
      ),
    }),
  },
]

export const FAMILY_NAMES: readonly string[] = FAMILIES.flatMap(({ names }) => names)

/**
 * @param name the value of `tokenizer.ggml.pre`; files from before that key have none
 * @throws LatticeError `model_unsupported` for a name that is not known: a guess would be wrong
 */
export function preTokenizerFamily(name: string | undefined): PreTokenizerFamily {
  const family = FAMILIES.find(({ names }) => names.includes(name ?? 'default'))
  if (family !== undefined) return family.make()
  throw new LatticeError(
    'model_unsupported',
    `The GGUF file's pre-tokenizer "${name}" (tokenizer.ggml.pre) is not known.`,
    { todo: `Known are ${FAMILY_NAMES.join(', ')}.` },
  )
}
