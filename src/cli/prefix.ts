// Owns `lattice prefix`: which beginnings of prompts a running server keeps in its memory.

import { Command } from 'commander'
import { readFileSync } from 'node:fs'
import { LatticeError } from '../errors.ts'
import {
  addServerOptions,
  askServer,
  notLattice,
  type ServerAddress,
  whyNothing,
} from './server-client.ts'
import { formatBytes, formatMs, formatTable } from './table.ts'

interface PinOptions extends ServerAddress {
  system?: boolean
  json?: boolean
}

/** As the server describes a pinned prefix. */
interface PrefixJson {
  id: string
  tokens: number
  pages: number
  bytes: number
  uses: number
  age_ms: number
  cached_tokens?: number
}

/** Computing a prefix of a whole context takes minutes on a small machine. */
const PIN_TIMEOUT_MS = 600_000

export function prefixCommand(): Command {
  return new Command('prefix')
    .description(
      "Keeps beginnings of prompts in a server's memory, each computed once. They belong to the" +
        ' API key that pins them: no other key finds them.',
    )
    .addCommand(pinCommand())
    .addCommand(unpinCommand())
    .addCommand(lsCommand())
}

function pinCommand(): Command {
  const command = new Command('pin')
    .description(
      'Computes a prefix and keeps it until it is unpinned. A .json file is the messages (and' +
        ' tools) of a chat, such as /save writes; any other is text as for /v1/completions.',
    )
    .argument('<FILE>', 'what to keep; - is stdin')
    .option('--system', 'the text is the system message of chats')
    .option('--json', "print the server's own JSON")
  return addServerOptions(command).action(pin)
}

function unpinCommand(): Command {
  const command = new Command('unpin')
    .description('Lets prefixes go: they stay cached only for as long as they are worth it.')
    .argument('<ID...>', 'as `lattice prefix ls` shows them')
  return addServerOptions(command).action(unpin)
}

function lsCommand(): Command {
  const command = new Command('ls')
    .description('Lists the prefixes that this API key has pinned.')
    .option('--json', "print the server's own JSON")
  return addServerOptions(command).action(ls)
}

async function pin(file: string, options: PinOptions): Promise<void> {
  const body = bodyOf(file, options.system ?? false)
  const answer = await askServer(options, '/v1/prefixes', { body, timeoutMs: PIN_TIMEOUT_MS })
  const prefix = answer as unknown as PrefixJson
  if (options.json) return print(JSON.stringify(answer))
  print(
    `${prefix.id}: ${prefix.tokens} tokens in ${formatBytes(prefix.bytes)},` +
      ` ${prefix.cached_tokens} of them in memory already`,
  )
}

async function unpin(ids: readonly string[], options: ServerAddress): Promise<void> {
  for (const id of ids) {
    const path = `/v1/prefixes/${encodeURIComponent(id)}`
    await askServer(options, path, { method: 'DELETE' })
    print(id)
  }
}

async function ls(options: PinOptions): Promise<void> {
  const answer = await askServer(options, '/v1/prefixes')
  if (!Array.isArray(answer['data'])) throw notLattice(options.url, 200)
  if (options.json) return print(JSON.stringify(answer))
  if (answer['data'].length === 0) return print(await whyNothing(options, 'Nothing is pinned.'))
  const rows = (answer['data'] as PrefixJson[]).map((prefix) => [
    prefix.id,
    String(prefix.tokens),
    String(prefix.pages),
    formatBytes(prefix.bytes),
    String(prefix.uses),
    formatMs(prefix.age_ms),
  ])
  const right = true
  const columns = [
    { title: 'PREFIX' },
    { title: 'TOKENS', right },
    { title: 'PAGES', right },
    { title: 'BYTES', right },
    { title: 'USES', right },
    { title: 'AGE', right },
  ]
  print(formatTable(columns, rows))
}

/** What a file asks the server to keep. */
function bodyOf(file: string, system: boolean): object {
  const text = readText(file)
  if (system) return { messages: [{ role: 'system', content: text }] }
  if (!file.endsWith('.json')) return { prompt: text }
  let chat: unknown
  try {
    chat = JSON.parse(text)
  } catch (cause) {
    throw new LatticeError('usage', `${file} is not valid JSON.`, { cause })
  }
  if (Array.isArray(chat)) return { messages: chat as unknown[] }
  const { messages, tools } = (chat ?? {}) as { messages?: unknown; tools?: unknown }
  if (Array.isArray(messages)) return { messages, ...(tools === undefined ? {} : { tools }) }
  throw new LatticeError('usage', `${file} has no messages.`, {
    todo: 'Write {"messages": [{"role": "system", "content": "…"}]}, or give a text file.',
  })
}

function readText(file: string): string {
  try {
    return readFileSync(file === '-' ? 0 : file, 'utf8')
  } catch (cause) {
    const why = cause instanceof Error ? cause.message : String(cause)
    throw new LatticeError('usage', `${file} cannot be read: ${why}.`, { cause })
  }
}

function print(line: string): void {
  process.stdout.write(`${line}\n`)
}
