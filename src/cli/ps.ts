// Owns `lattice ps`: what a running server's requests hold of its KV memory, now or every second.

import { Command } from 'commander'
import { setTimeout as sleep } from 'node:timers/promises'
import type { EngineSnapshot } from '../engine/api.ts'
import { LatticeError } from '../errors.ts'
import { parseUrl } from './parse.ts'
import { EXIT_INTERRUPTED } from './report.ts'
import { formatBytes, formatMs, formatTable } from './table.ts'
import { borrowTerminal, interruptible } from './terminal.ts'

interface PsOptions {
  url: string
  apiKey?: string
  json?: boolean
  watch?: boolean
}

const WATCH_INTERVAL_MS = 1000
const ANSWER_TIMEOUT_MS = 10_000
const ALTERNATE_SCREEN = '\x1b[?1049h\x1b[?25l'
const NORMAL_SCREEN = '\x1b[?25h\x1b[?1049l'
const HOME_AND_CLEAR = '\x1b[H\x1b[J'

export function psCommand(): Command {
  return new Command('ps')
    .description("Shows a server's requests: state, tokens, and the pages and bytes of KV memory.")
    .option('--url <URL>', 'address of the server', parseUrl, 'http://127.0.0.1:8080')
    .option('--api-key <KEY>', 'key of the server (default: LATTICE_API_KEY)')
    .option('--json', "print the server's own JSON; with --watch, a line each time")
    .option('--watch', 'again every second, until Ctrl-C')
    .action(ps)
}

async function ps(options: PsOptions): Promise<void> {
  if (!options.watch) return print(await fetchSnapshot(options), options)
  const redraw = process.stdout.isTTY && !options.json
  const restore = redraw ? borrowTerminal(ALTERNATE_SCREEN, NORMAL_SCREEN) : () => {}
  try {
    await interruptible(async (interrupt) => {
      while (!interrupt.aborted) {
        const snapshot = await fetchSnapshot(options)
        if (redraw) process.stdout.write(HOME_AND_CLEAR)
        print(snapshot, options)
        await sleep(WATCH_INTERVAL_MS, undefined, { signal: interrupt }).catch(() => {})
      }
    })
    process.exitCode = EXIT_INTERRUPTED
  } finally {
    restore()
  }
}

async function fetchSnapshot({ url, apiKey }: PsOptions): Promise<EngineSnapshot> {
  const key = apiKey ?? process.env['LATTICE_API_KEY']
  let response: Response
  try {
    response = await fetch(`${url}/debug/sequences`, {
      headers: key === undefined ? {} : { authorization: `Bearer ${key}` },
      signal: AbortSignal.timeout(ANSWER_TIMEOUT_MS),
    })
  } catch (cause) {
    throw new LatticeError('server_unreachable', `No server answers at ${url}.`, {
      todo: 'Start one with `lattice serve`, or name another with --url.',
      cause,
    })
  }
  if (response.status === 401) {
    throw new LatticeError('unauthorized', `The server at ${url} asks for another API key.`, {
      todo: 'Give it with --api-key or in LATTICE_API_KEY.',
    })
  }
  if (response.status === 503) {
    throw new LatticeError('engine_stopped', `The server at ${url} has an engine that is silent.`, {
      todo: 'It computes a very long step or has stopped: try again, then look at its log.',
    })
  }
  const body: unknown = response.ok ? await response.json().catch(() => undefined) : undefined
  if (typeof body !== 'object' || body === null || !('sequences' in body)) {
    throw new LatticeError(
      'server_unreachable',
      `What answers at ${url} is no Lattice server (status ${response.status}).`,
      { todo: 'Name the address of one with --url.' },
    )
  }
  return body as EngineSnapshot
}

function print(snapshot: EngineSnapshot, { json }: PsOptions): void {
  process.stdout.write(`${json ? JSON.stringify(snapshot) : describe(snapshot)}\n`)
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
