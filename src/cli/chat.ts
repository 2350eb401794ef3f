// Owns `lattice chat`: a conversation in the terminal, kept in memory and nowhere else.

import { Command } from 'commander'
import { writeFileSync } from 'node:fs'
import { styleText } from 'node:util'
import { LatticeError, toLatticeError } from '../errors.ts'
import { LineReader } from './lines.ts'
import {
  addEngineOptions,
  addSamplingOptions,
  type EngineOptions,
  type SamplingOptions,
} from './options.ts'
import { EXIT_INTERRUPTED, printError } from './report.ts'
import { answer, type ChatMessage, chatPrompt, openSession, type Session } from './session.ts'
import { interruptible, stdoutWriter } from './terminal.ts'

interface ChatOptions extends EngineOptions, SamplingOptions {
  system?: string
}

const HELP = `  """            begins a message of several lines; """ ends it
  /clear         forget the conversation
  /system TEXT   set the system message; without TEXT, show it
  /save FILE     write the conversation as JSON
  /help          this list
  /exit          leave, as Ctrl-D does
  Ctrl-C stops an answer; the arrow keys bring back earlier lines.
  A line that starts with a space is always a message.`

export function chatCommand(): Command {
  const command = new Command('chat')
    .description('Talks with a model in the terminal, without a server. /help lists its commands.')
    .option('--system <TEXT>', 'the system message')
  addSamplingOptions(command)
  return addEngineOptions(command).action(chat)
}

async function chat(options: ChatOptions): Promise<void> {
  const session = await openSession(options)
  try {
    // Said before anything is typed, not after the first message.
    chatPrompt(session, [{ role: 'user', content: 'Hello' }])
    for (const line of [...session.report, `${session.modelId} listens. /help for help.`]) say(line)
    await converse(session, options)
  } finally {
    await session.engine.close()
  }
}

async function converse(session: Session, options: ChatOptions): Promise<void> {
  const lines = new LineReader()
  const conversation = new Conversation(session.modelId, options.system)
  for (let interrupts = 0; ;) {
    const typed = await readMessage(lines)
    if (typed.kind === 'end') return
    if (typed.kind === 'interrupt') {
      interrupts = typed.discarded ? 0 : interrupts + 1
      if (interrupts === 2) {
        process.exitCode = EXIT_INTERRUPTED
        return
      }
      if (interrupts === 1) say('Ctrl-C again, Ctrl-D or /exit leaves.')
      continue
    }
    interrupts = 0
    if (typed.text.trim() === '') continue
    try {
      if (typed.text.startsWith('/')) {
        if (obey(typed.text, conversation) === 'leave') return
      } else {
        await reply(session, conversation, typed.text.trim(), options)
      }
    } catch (thrown) {
      const error = toLatticeError(thrown)
      printError(error)
      if (error.code === 'context_length_exceeded') say('/clear starts over.')
      if (error.code === 'engine_stopped' || error.code === 'internal') throw thrown
    }
  }
}

/** One message: a line, or everything between two `"""`. */
async function readMessage(lines: LineReader): ReturnType<LineReader['read']> {
  const typed = await lines.read('>>> ')
  if (typed.kind !== 'line' || !typed.text.startsWith('"""')) return typed
  let text = typed.text.slice(3)
  while (!text.trimEnd().endsWith('"""')) {
    const next = await lines.read('... ')
    if (next.kind === 'interrupt') return { kind: 'interrupt', discarded: true }
    if (next.kind === 'end') return next
    text += `\n${next.text}`
  }
  return { kind: 'line', text: ` ${text.trimEnd().slice(0, -3).trim()}` }
}

async function reply(
  session: Session,
  conversation: Conversation,
  text: string,
  options: ChatOptions,
): Promise<void> {
  const messages: ChatMessage[] = [...conversation.messages, { role: 'user', content: text }]
  const result = await interruptible((interrupt) =>
    answer(session, chatPrompt(session, messages), options, stdoutWriter(), interrupt),
  )
  process.stdout.write('\n\n')
  if (result.reason === 'length') say(`(stopped after ${result.outputTokens} tokens)`)
  if (result.reason === 'abort') say('(stopped)')
  conversation.messages = [...messages, { role: 'assistant', content: result.text }]
}

function obey(line: string, conversation: Conversation): 'stay' | 'leave' {
  const [command = '', ...words] = line.trim().split(/\s+/)
  const argument = words.join(' ')
  if (command === '/exit' || command === '/quit') return 'leave'
  if (command === '/help') say(HELP)
  else if (command === '/clear') conversation.clear()
  else if (command === '/system' && argument === '') say(conversation.system ?? '(none)')
  else if (command === '/system') conversation.setSystem(argument)
  else if (command === '/save') conversation.save(argument)
  else {
    throw new LatticeError('usage', `There is no command ${command}.`, {
      todo: '/help lists them; begin the line with a space to send it as a message.',
    })
  }
  return 'stay'
}

class Conversation {
  messages: ChatMessage[] = []
  readonly #modelId: string

  constructor(modelId: string, system: string | undefined) {
    this.#modelId = modelId
    if (system !== undefined) this.setSystem(system)
  }

  get system(): string | undefined {
    const first = this.messages[0]
    return first?.role === 'system' ? first.content : undefined
  }

  setSystem(text: string): void {
    const rest = this.messages.filter((message) => message.role !== 'system')
    this.messages = [{ role: 'system', content: text }, ...rest]
  }

  clear(): void {
    this.messages = this.messages.filter((message) => message.role === 'system')
    say('Forgotten.')
  }

  save(file: string): void {
    if (file === '') throw new LatticeError('usage', '/save needs a file name: /save talk.json')
    const body = { model: this.#modelId, messages: this.messages }
    try {
      // 'wx': a slip of the keyboard must not replace a file.
      writeFileSync(file, `${JSON.stringify(body, null, 2)}\n`, { flag: 'wx' })
    } catch (cause) {
      throw new LatticeError('os_call_failed', `${file} was not written: ${message(cause)}`, {
        todo: 'Choose another name; an existing file is never replaced.',
        cause,
      })
    }
    say(`Saved ${this.messages.length} messages to ${file}.`)
  }
}

function message(thrown: unknown): string {
  return thrown instanceof Error ? thrown.message : String(thrown)
}

/** What the program says about itself, on stderr: stdout carries the conversation only. */
function say(text: string): void {
  process.stderr.write(`${styleText('dim', text, { stream: process.stderr })}\n`)
}
