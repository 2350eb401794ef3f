// Owns `lattice run`: one prompt in, one answer out on stdout, nothing else on it.

import { Command } from 'commander'
import { existsSync, fstatSync } from 'node:fs'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import type { BeamParams } from '../engine/api.ts'
import { LatticeError } from '../errors.ts'
import { MAX_CHOICES } from '../limits.ts'
import { warn } from '../log.ts'
import {
  addEngineOptions,
  addSamplingOptions,
  type EngineOptions,
  type SamplingOptions,
} from './options.ts'
import { parseCount, parseNumber } from './parse.ts'
import { EXIT_INTERRUPTED } from './report.ts'
import {
  type Answer,
  answer,
  type ChatMessage,
  chatPrompt,
  openSession,
  type Session,
} from './session.ts'
import { formatMs } from './table.ts'
import { interruptible, stdoutWriter } from './terminal.ts'

interface RunOptions extends EngineOptions, SamplingOptions {
  beams?: number
  lengthPenalty?: number
  system?: string
  raw?: boolean
  ignoreEos?: boolean
  json?: boolean
  verbose?: boolean
  server?: string
  tenant?: number
  tenantKeyFile?: string
}

export function runCommand(): Command {
  const command = new Command('run')
    .description(
      'Answers one prompt on stdout, without a server. Without PROMPT, stdin is the prompt; ' +
        'with PROMPT, a pipe or file on stdin follows it after an empty line.',
    )
    .argument('[PROMPT...]', 'what to ask; several words are joined by spaces')
    .option('--system <TEXT>', 'the system message')
    .option('--raw', 'continue the prompt as plain text, without the chat template')
    .option('--json', 'print one JSON object at the end: text, finish_reason, usage, timings')
    .option('-v, --verbose', 'say on stderr what was chosen and how fast it went')
  addSamplingOptions(command)
    .option('--ignore-eos', 'go on after the end of the answer')
    .option(
      '--beams <N>',
      'search for the likeliest answer with N beams, instead of sampling',
      parseCount(2, MAX_CHOICES),
    )
    .option(
      '--length-penalty <X>',
      'with --beams: above 1 favours longer answers (default: 1)',
      parseNumber(-10, 10),
    )
  addEngineOptions(command)
  return command
    .optionsGroup('Another machine:')
    .option('--server <URL>', 'ask a server over datagrams: lattice://HOST:PORT')
    .option('--tenant <N>', 'as which of its tenants (or LATTICE_TENANT)', parseCount(0, 1023))
    .option('--tenant-key-file <FILE>', "file with the tenant's key (or LATTICE_TENANT_KEY)")
    .action(run)
}

async function run(words: string[], options: RunOptions, command: Command): Promise<void> {
  const search = searchOf(options, command)
  if (options.raw && options.system !== undefined) {
    throw new LatticeError(
      'usage',
      '--raw uses no chat template, so --system has no place in it.',
      {
        todo: 'Write the system text into the prompt, or leave one of the two out.',
      },
    )
  }
  if (options.model === undefined && words.length > 1) await noteModel(words[0] ?? '')
  const prompt = await readPrompt(words.join(' '))
  if (options.server !== undefined) {
    const given = Object.keys(options).filter((name) => {
      return command.getOptionValueSource(name) === 'cli'
    })
    return runRemotely(prompt, { ...options, server: options.server }, given)
  }
  const session = await openSession(options, { maxSequences: search?.width ?? 1 })
  try {
    if (options.verbose) for (const line of session.report) process.stderr.write(`${line}\n`)
    const asked = search ? { ...options, search } : options
    const write = options.json ? () => {} : stdoutWriter()
    const result = await interruptible((interrupt) =>
      answer(session, encode(session, prompt, options), asked, write, interrupt),
    )
    if (options.json) process.stdout.write(`${JSON.stringify(jsonResult(session, result))}\n`)
    else process.stdout.write('\n')
    if (options.verbose) process.stderr.write(`${summary(session, result)}\n`)
    if (result.reason === 'length') {
      process.stderr.write(`(stopped after ${result.outputTokens} tokens: see --max-tokens)\n`)
    }
    if (result.reason === 'abort') process.exitCode = EXIT_INTERRUPTED
  } finally {
    await session.engine.close()
  }
}

/** Options that choose a token at random, of which a search has none. */
const SAMPLING = [
  ...['temperature', 'topK', 'topP', 'minP', 'typicalP', 'seed', 'stop'],
  ...['repetitionPenalty', 'presencePenalty', 'frequencyPenalty'],
]

function searchOf(options: RunOptions, command: Command): BeamParams | undefined {
  const { beams, lengthPenalty } = options
  if (beams === undefined) {
    if (lengthPenalty === undefined) return undefined
    throw new LatticeError('usage', '--length-penalty ranks beams, and there are none.', {
      todo: 'Give --beams too, or leave it out.',
    })
  }
  const given = SAMPLING.find((name) => command.getOptionValueSource(name) === 'cli')
  if (given !== undefined) {
    const flag = `--${given.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`
    throw new LatticeError('usage', `${flag} has no place in a search with --beams.`, {
      todo: 'Leave one of the two out.',
    })
  }
  return { width: beams, lengthPenalty: lengthPenalty ?? 1, earlyStopping: false }
}

async function runRemotely(
  prompt: string,
  options: RunOptions & { server: string },
  given: readonly string[],
): Promise<void> {
  const { answerRemotely, checkCarried } = await import('./run-remote.ts')
  checkCarried(given)
  const write = options.json ? () => {} : stdoutWriter()
  const result = await interruptible((interrupt) =>
    answerRemotely(prompt, options, write, interrupt),
  )
  if (options.json) {
    const { text, reason, promptTokens, outputTokens, cachedTokens, ttftMs, totalMs } = result
    const usage = {
      prompt_tokens: promptTokens,
      completion_tokens: outputTokens,
      total_tokens: promptTokens + outputTokens,
      cached_tokens: cachedTokens,
    }
    const timings = { ttft_ms: round(ttftMs), total_ms: round(totalMs) }
    process.stdout.write(`${JSON.stringify({ text, finish_reason: reason, usage, timings })}\n`)
  } else process.stdout.write('\n')
  if (result.reason === 'length') {
    process.stderr.write(`(stopped after ${result.outputTokens} tokens: see --max-tokens)\n`)
  }
  if (result.reason === 'abort') process.exitCode = EXIT_INTERRUPTED
}

/** The first word names a model with other programs of this kind, not here. */
async function noteModel(word: string): Promise<void> {
  const { Store, storeName } = await import('../model/store.ts')
  if (storeName(word) !== word || !existsSync(join(new Store().root, word))) return
  warn(`${word} was read as a word of the prompt; --model ${word} asks that model`)
}

async function readPrompt(argument: string): Promise<string> {
  const stdin = fstatSync(0)
  const piped = stdin.isFIFO() || stdin.isFile()
  if (argument !== '' && !piped) return argument
  if (process.stdin.isTTY) {
    throw new LatticeError('usage', 'There is no prompt.', {
      todo: 'Write one, as in: lattice run "Why is the sky blue?" (or pipe a text in).',
    })
  }
  const input = (await text(process.stdin)).trimEnd()
  const prompt = [argument, input].filter((part) => part !== '').join('\n\n')
  if (prompt === '') {
    throw new LatticeError('usage', 'The prompt on stdin is empty.', {
      todo: 'Pipe some text in, or write the prompt as an argument.',
    })
  }
  return prompt
}

function encode(session: Session, prompt: string, { raw, system }: RunOptions): Int32Array {
  if (raw) return session.tokenizer.encode(prompt, { addSpecial: true, parseSpecial: false })
  const messages: ChatMessage[] = [{ role: 'user', content: prompt }]
  if (system !== undefined) messages.unshift({ role: 'system', content: system })
  return chatPrompt(session, messages)
}

function jsonResult(session: Session, result: Answer): object {
  return {
    model: session.modelId,
    text: result.text,
    finish_reason: result.reason,
    ...(result.score === undefined ? { seed: result.seed } : { score: result.score }),
    usage: {
      prompt_tokens: result.promptTokens,
      completion_tokens: result.outputTokens,
      total_tokens: result.promptTokens + result.outputTokens,
    },
    timings: {
      load_ms: round(session.loadMs),
      ttft_ms: round(result.ttftMs),
      total_ms: round(result.totalMs),
      decode_tokens_per_s: round(decodeRate(result)),
    },
  }
}

function summary(session: Session, result: Answer): string {
  return (
    `loaded in ${formatMs(session.loadMs)} · ${result.promptTokens} prompt tokens, first answer ` +
    `token after ${formatMs(result.ttftMs)} · ${result.outputTokens} answer tokens, ` +
    `${decodeRate(result).toFixed(1)} a second · ` +
    (result.score === undefined ? `seed ${result.seed}` : `score ${result.score.toFixed(4)}`)
  )
}

/** Tokens a second after the first one; 0 when there was no second. A search has them at once. */
function decodeRate({ outputTokens, ttftMs, totalMs, score }: Answer): number {
  if (score !== undefined) return (outputTokens * 1000) / totalMs
  return totalMs > ttftMs ? ((outputTokens - 1) * 1000) / (totalMs - ttftMs) : 0
}

function round(value: number): number {
  return Math.round(value * 100) / 100
}
