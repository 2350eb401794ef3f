// Owns the options that several commands share: which model on what, and how tokens are chosen.

import { type Command, Option } from 'commander'
import { randomInt } from 'node:crypto'
import { QUANTIZATIONS, type Quantization } from '../backends/cuda/quantization.ts'
import type { SamplingParams } from '../engine/api.ts'
import type { DeviceOption } from '../engine/device.ts'
import { EVICTION_DEFAULT, EVICTION_NAMES, type EvictionName } from '../kv/eviction.ts'
import {
  collect,
  parseCount,
  parseNumber,
  parsePlace,
  parseSize,
  parseTokens,
  parseWatermarks,
} from './parse.ts'

export interface EngineOptions {
  model?: string
  device: DeviceOption
  quantization?: Quantization
  threads?: number
  context?: number
  kvMemory?: number
  prefixCache?: number
  kvIdleRelease?: number
  prefixEviction?: EvictionName
  prefixCacheOutput: 'on' | 'off'
  kvHost?: number
  kvOffload?: { bytes: number; path?: string }
  kvWatermark?: { high: number; low: number }
  kvStore?: string
  kvStoreKey?: string
}

export interface SamplingOptions {
  maxTokens?: number
  temperature: number
  topK: number
  topP: number
  minP: number
  typicalP: number
  repetitionPenalty: number
  presencePenalty: number
  frequencyPenalty: number
  seed?: number
  stop?: string[]
}

/** Output tokens of one answer, unless `--max-tokens` says otherwise: some pages of text. */
export const ANSWER_TOKENS_DEFAULT = 1024

export function addEngineOptions(command: Command): Command {
  return command
    .optionsGroup('Model and machine:')
    .option('-m, --model <MODEL>', 'a name from `lattice ls`, a source as for pull, or a path')
    .addOption(
      new Option('--device <DEVICE>', 'what computes; auto takes a GPU if there is one')
        .choices(['auto', 'cpu', 'cuda'])
        .default('auto'),
    )
    .addOption(
      new Option(
        '--quantization <TYPE>',
        'what the weights become when a GPU loads them: fp8 is e4m3 with a scale a row, and is' +
          ' multiplied so, too (default: bfloat16)',
      ).choices(QUANTIZATIONS),
    )
    .option('--threads <N>', 'threads that compute (default: one a core)', parseCount(1, 1024))
    .option(
      '--context <TOKENS>',
      "longest sequence, prompt and answer: 8192 or 8K (default: the model's)",
      parseTokens,
    )
    .option(
      '--kv-memory <SIZE>',
      'hard limit on KV cache memory: 512M (default: from free memory)',
      parseSize,
    )
    .option(
      '--kv-idle-release <SECONDS>',
      'when idle KV memory of a GPU is given back to the driver (default: 0.5)',
      parseNumber(0, 86_400),
    )
    .option(
      '--prefix-cache <SIZE>',
      'how much of it may keep prompts for later ones that begin alike (default: none)',
      parseSize,
    )
    .addOption(
      new Option(
        '--prefix-eviction <POLICY>',
        'which prompts go first: longest unused, least used, or cheapest to compute again' +
          ` for what it frees (default: ${EVICTION_DEFAULT})`,
      ).choices(EVICTION_NAMES),
    )
    .addOption(
      new Option(
        '--prefix-cache-output <WHETHER>',
        'keep answers too, so that the next turn of a chat computes only what is new; that turn' +
          ' may then be answered otherwise than by a server that has just started',
      )
        .choices(['on', 'off'])
        .default('off'),
    )
    .option(
      '--kv-host <SIZE>',
      'memory of the host, pinned, for KV that a GPU has no room for (default: none, or 256M on' +
        ' the way to --kv-offload)',
      parseSize,
    )
    .option(
      '--kv-offload <SIZE[:DIR]>',
      'a file, in /var/tmp or DIR, for KV that memory has no room for (default: none)',
      parsePlace,
    )
    .option(
      '--kv-watermark <HIGH:LOW>',
      'percent of --kv-memory, and of --prefix-cache: above HIGH, cached prompts go there until' +
        ' LOW is in use (default: 90:80)',
      parseWatermarks,
    )
    .option(
      '--kv-store <DIR>',
      'keep prompts there, encrypted, beyond a restart; with --kv-offload SIZE (default: none)',
    )
    .option('--kv-store-key <KEY>', 'its key: a file with 32 bytes, or keyring:NAME')
}

export function addSamplingOptions(command: Command): Command {
  return command
    .optionsGroup('Answer:')
    .option(
      '--max-tokens <N>',
      `longest answer in tokens (default: ${ANSWER_TOKENS_DEFAULT}, or what the context holds)`,
      parseCount(1),
    )
    .option('--temperature <T>', '0 always takes the likeliest token', parseNumber(0, 2), 0.7)
    .option('--top-k <K>', 'choose among the K likeliest tokens; 0 is off', parseCount(0), 0)
    .option('--top-p <P>', 'choose among the likeliest tokens of sum P', parseNumber(0, 1), 0.9)
    .option('--min-p <P>', 'drop tokens below P times the likeliest', parseNumber(0, 1), 0)
    .option('--typical-p <P>', 'choose among typical tokens of sum P', parseNumber(0, 1), 1)
    .option('--repetition-penalty <R>', 'above 1 repeats less', parseNumber(0.01, 10), 1)
    .option('--presence-penalty <P>', 'above 0 favours new tokens', parseNumber(-2, 2), 0)
    .option('--frequency-penalty <P>', 'above 0 repeats less often', parseNumber(-2, 2), 0)
    .option('--seed <N>', 'same seed, same answer (default: drawn)', parseCount(0))
    .option('--stop <TEXT>', 'end before this text; may be repeated', collect)
}

export function samplingParams(options: SamplingOptions): SamplingParams {
  const { temperature, topK, topP, minP, typicalP } = options
  const { repetitionPenalty, presencePenalty, frequencyPenalty } = options
  return {
    temperature,
    topK,
    topP,
    minP,
    typicalP,
    repetitionPenalty,
    presencePenalty,
    frequencyPenalty,
    logitBias: [],
    seed: options.seed ?? randomInt(2 ** 32),
  }
}

/** The object without its undefined entries, as exact optional properties want it. */
export function defined<T extends object>(
  object: T,
): { [K in keyof T]?: Exclude<T[K], undefined> } {
  return Object.fromEntries(
    Object.entries(object).filter(([, value]) => value !== undefined),
  ) as ReturnType<typeof defined<T>>
}
