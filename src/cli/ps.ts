// Owns `lattice ps`: what a running server's requests hold of its KV memory, now or every second.

import { Command } from 'commander'
import { setTimeout as sleep } from 'node:timers/promises'
import type { EngineSnapshot } from '../engine/api.ts'
import { EXIT_INTERRUPTED } from './report.ts'
import { sessionList } from './sessions.ts'
import { addServerOptions, askServer, notLattice, type ServerAddress } from './server-client.ts'
import { formatBytes, formatMs, formatTable } from './table.ts'
import { borrowTerminal, interruptible } from './terminal.ts'

interface PsOptions extends ServerAddress {
  sessions?: boolean
  json?: boolean
  watch?: boolean
}

const WATCH_INTERVAL_MS = 1000
const ALTERNATE_SCREEN = '\x1b[?1049h\x1b[?25l'
const NORMAL_SCREEN = '\x1b[?25h\x1b[?1049l'
const HOME_AND_CLEAR = '\x1b[H\x1b[J'

export function psCommand(): Command {
  const command = new Command('ps').description(
    "Shows a server's requests: state, tokens, and the pages and bytes of KV memory.",
  )
  return addServerOptions(command)
    .option('--sessions', "this API key's cached conversations instead, and where they are")
    .option('--json', "print the server's own JSON; with --watch, a line each time")
    .option('--watch', 'again every second, until Ctrl-C')
    .action(ps)
}

async function ps(options: PsOptions): Promise<void> {
  if (!options.watch) return print(await view(options))
  const redraw = process.stdout.isTTY && !options.json
  const restore = redraw ? borrowTerminal(ALTERNATE_SCREEN, NORMAL_SCREEN) : () => {}
  try {
    await interruptible(async (interrupt) => {
      while (!interrupt.aborted) {
        const text = await view(options)
        if (redraw) process.stdout.write(HOME_AND_CLEAR)
        print(text)
        await sleep(WATCH_INTERVAL_MS, undefined, { signal: interrupt }).catch(() => {})
      }
    })
    process.exitCode = EXIT_INTERRUPTED
  } finally {
    restore()
  }
}

async function view(options: PsOptions): Promise<string> {
  const { sessions, json = false } = options
  if (sessions) return sessionList(options, json)
  const snapshot = await fetchSnapshot(options)
  return json ? JSON.stringify(snapshot) : describe(snapshot)
}

async function fetchSnapshot(options: PsOptions): Promise<EngineSnapshot> {
  const answer = await askServer(options, '/debug/sequences')
  if (!('sequences' in answer)) throw notLattice(options.url, 200)
  return answer as unknown as EngineSnapshot
}

function print(text: string): void {
  process.stdout.write(`${text}\n`)
}

function describe({ sequences, running, waiting, kv }: EngineSnapshot): string {
  const table = formatTable(
    [
      { title: 'REQUEST' },
      { title: 'TENANT' },
      { title: 'STATE' },
      { title: 'PROMPT', right: true },
      { title: 'OUTPUT', right: true },
      { title: 'IN KV', right: true },
      { title: 'PAGES', right: true },
      { title: 'BYTES', right: true },
      { title: 'AGE', right: true },
    ],
    sequences.map((sequence) => [
      sequence.requestId,
      sequence.tenant,
      sequence.state,
      String(sequence.promptTokens),
      String(sequence.outputTokens),
      String(sequence.kvTokens),
      String(sequence.pages),
      formatBytes(sequence.bytes),
      formatMs(sequence.ageMs),
    ]),
  )
  const used = formatBytes(kv.usedPages * kv.pageBytes)
  const limit = formatBytes(kv.limitPages * kv.pageBytes)
  return (
    `${table}\n\n${running} running, ${waiting} waiting · ` +
    `${kv.usedPages} of ${kv.limitPages} pages of ${formatBytes(kv.pageBytes)} used, ` +
    `${used} of ${limit} · ${formatBytes(kv.residentBytes)} resident`
  )
}
