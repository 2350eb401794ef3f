// Owns what `lattice bench serve` asks: random prompts of an exact number of tokens, or a file's.

import { readFileSync } from 'node:fs'
import { RandomStream } from '../engine/sampler-random.ts'
import { LatticeError } from '../errors.ts'
import type { BenchClient } from './serve-client.ts'

export interface Prompt {
  text: string
  /** Counted by the server's /tokenize, or by words where there is none. */
  tokens: number
  /** Output tokens to ask for. */
  maxTokens: number
}

export interface RandomLengths {
  inputTokens: number
  outputTokens: number
  /** Lengths are uniform in [n·(1 − ratio), n·(1 + ratio)]. */
  rangeRatio: number
}

/** Common words: nearly every vocabulary has a token for each, so words approximate tokens. */
const WORDS = (
  'time year people way day man thing woman life child world school state family student group ' +
  'country problem hand part place case week company system program question work government ' +
  'number night point home water room mother area money story fact month lot right study book ' +
  'eye job word business issue side kind head house service friend father power hour game line ' +
  'end member law car city community name president team minute idea body information back ' +
  'parent face others level office door health person art war history party result change ' +
  'morning reason research girl guy moment air teacher force education green open white small ' +
  'large young early long little great high last public old bad same able'
).split(' ')

/** Rounds of cutting and asking again before a prompt's length counts as unreachable. */
const TRIES_MAX = 12

/**
 * @returns prompts that share no beginning by design; `exact` is false if the server has no
 *   /tokenize and /detokenize, so that a word was taken for a token.
 */
export async function randomPrompts(
  client: BenchClient,
  model: string,
  count: number,
  lengths: RandomLengths,
  seed: number,
): Promise<{ prompts: Prompt[]; exact: boolean }> {
  const random = new RandomStream(seed)
  const within = (n: number): number => {
    const low = Math.max(1, Math.ceil(n * (1 - lengths.rangeRatio)))
    const high = Math.max(low, Math.floor(n * (1 + lengths.rangeRatio)))
    return low + Math.floor(random.uniform() * (high - low + 1))
  }
  const prompts: Prompt[] = []
  let exact = true
  for (let i = 0; i < count; i++) {
    const tokens = within(lengths.inputTokens)
    const maxTokens = within(lengths.outputTokens)
    let text: string | undefined
    if (exact) text = await exactText(client, model, tokens, random)
    exact &&= text !== undefined
    prompts.push({ text: text ?? words(random, tokens), tokens, maxTokens })
  }
  return { prompts, exact }
}

/** Text of exactly `tokens` tokens; undefined if the server cannot say, or none was found. */
async function exactText(
  client: BenchClient,
  model: string,
  tokens: number,
  random: RandomStream,
): Promise<string | undefined> {
  let text = words(random, tokens)
  try {
    for (let attempt = 0; attempt < TRIES_MAX; attempt++) {
      const encoded = await client.json('/tokenize', {
        model,
        prompt: text,
        add_special_tokens: false,
      })
      const ids = (encoded as { tokens: number[] }).tokens
      if (ids.length === tokens) return text
      if (ids.length < tokens) {
        text += ` ${words(random, tokens - ids.length)}`
        continue
      }
      // A cut may leave half a word, which then counts otherwise: so it is asked again.
      const decoded = await client.json('/detokenize', { model, tokens: ids.slice(0, tokens) })
      text = (decoded as { prompt: string }).prompt
    }
  } catch {
    // Not a server with these endpoints: the caller says so.
  }
  return undefined
}

function words(random: RandomStream, count: number): string {
  const pick = (): string => WORDS[Math.floor(random.uniform() * WORDS.length)]!
  return Array.from({ length: count }, pick).join(' ')
}

/**
 * Prompts from a file with a JSON object a line: `{"prompt": "…", "output_tokens": 64}`; other
 * keys are for others. The file is gone through again if there are fewer than `count`.
 *
 * @param outputTokens where a line does not say.
 * @throws LatticeError `usage` naming the line that is not such an object.
 */
export function datasetPrompts(path: string, count: number, outputTokens: number): Prompt[] {
  const lines = readLines(path)
  const prompts = lines.map((line, i) => parseLine(line, `${path}, line ${i + 1}`, outputTokens))
  if (prompts.length === 0) throw unusable(`${path} has no prompts.`)
  return Array.from({ length: count }, (_, i) => prompts[i % prompts.length]!)
}

function readLines(path: string): string[] {
  try {
    const lines = readFileSync(path, 'utf8').split('\n')
    while (lines.at(-1)?.trim() === '') lines.pop()
    return lines
  } catch (error) {
    throw new LatticeError('not_found', `${path} cannot be read: ${(error as Error).message}`, {
      todo: 'Check --dataset.',
      cause: error,
    })
  }
}

function parseLine(line: string, where: string, outputTokens: number): Prompt {
  let value: unknown
  try {
    value = JSON.parse(line)
  } catch {
    throw unusable(`${where} is not JSON.`)
  }
  const { prompt, output_tokens: output = outputTokens } = Object(value) as {
    prompt?: unknown
    output_tokens?: unknown
  }
  if (typeof prompt !== 'string' || prompt === '') throw unusable(`${where} has no "prompt" text.`)
  if (typeof output !== 'number' || !Number.isInteger(output) || output < 1) {
    throw unusable(`${where} has an "output_tokens" that is not a number of tokens.`)
  }
  return { text: prompt, tokens: prompt.split(/\s+/).length, maxTokens: output }
}

function unusable(what: string): LatticeError {
  return new LatticeError('usage', what, {
    todo: 'Each line must be like {"prompt": "Why is the sky blue?", "output_tokens": 64}.',
  })
}
