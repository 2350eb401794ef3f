// Owns `lattice top`: a server's KV memory and sequences on a full screen, drawn anew each second.

import { Command } from 'commander'
import { emitKeypressEvents } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import { EXIT_INTERRUPTED } from './report.ts'
import { addServerOptions, askServer, notLattice, type ServerAddress } from './server-client.ts'
import { borrowTerminal, interruptible } from './terminal.ts'
import { topPage } from './top-page.ts'
import { type KvReport, Samples } from './top-samples.ts'

const INTERVAL_MS = 1000
const ENTER = '\x1b[?1049h\x1b[?25l\x1b[2J'
const LEAVE = '\x1b[?25h\x1b[?1049l'
/** Lines are overwritten in place, each cleared to its end: clearing the screen would flicker. */
const HOME = '\x1b[H'
const CLEAR_LINE = '\x1b[K'
const CLEAR_BELOW = '\x1b[J'

/** A page into a file or pipe. */
const PLAIN = { width: 100, height: 40 }

export function topCommand(): Command {
  const command = new Command('top')
    .description(
      "Shows a server's KV memory page by page, its sequences, rates and what lately happened," +
        ' drawn anew each second; q quits. Into a file or pipe it prints one page.',
    )
    .option('--json', "print the server's own JSON, once")
  return addServerOptions(command).action(top)
}

async function top(options: ServerAddress & { json?: boolean }): Promise<void> {
  if (options.json) return print(JSON.stringify(await fetchReport(options)))
  const samples = new Samples()
  const look = async (): Promise<KvReport> => {
    const report = await fetchReport(options)
    samples.add({ atMs: performance.now(), report })
    return report
  }
  await look()
  if (!process.stdout.isTTY) {
    // Rates need a second look.
    await sleep(INTERVAL_MS)
    const page = topPage(await look(), {
      ...options,
      ...PLAIN,
      colour: false,
      rates: samples.rates(),
    })
    return print(page.join('\n'))
  }
  await live(options, samples, look)
}

async function live(
  { url }: ServerAddress,
  samples: Samples,
  look: () => Promise<KvReport>,
): Promise<void> {
  const restore = borrowTerminal(ENTER, LEAVE)
  const quit = new AbortController()
  const keys = listen(quit)
  let report = await look()
  const draw = (): void => {
    const { columns: width, rows: height } = process.stdout
    const colour = (process.stdout.getColorDepth?.() ?? 1) > 1
    const lines = topPage(report, { url, width, height, colour, rates: samples.rates() })
    process.stdout.write(HOME + lines.map((line) => line + CLEAR_LINE).join('\r\n') + CLEAR_BELOW)
  }
  process.stdout.on('resize', draw)
  try {
    await interruptible(async (interrupt) => {
      const ended = AbortSignal.any([interrupt, quit.signal])
      while (!ended.aborted) {
        draw()
        await sleep(INTERVAL_MS, undefined, { signal: ended }).catch(() => {})
        if (!ended.aborted) report = await look()
      }
      if (interrupt.aborted) process.exitCode = EXIT_INTERRUPTED
    })
  } finally {
    process.stdout.off('resize', draw)
    keys()
    restore()
  }
}

/** Aborts at q or Ctrl-C, which a raw terminal gives as keys; returns what undoes it. */
function listen(quit: AbortController): () => void {
  const { stdin } = process
  if (!stdin.isTTY) return () => {}
  const onKey = (_text: string, key: { name?: string; ctrl?: boolean }): void => {
    if (key.ctrl && key.name === 'c') process.exitCode = EXIT_INTERRUPTED
    if (key.name === 'q' || (key.ctrl && key.name === 'c')) quit.abort()
  }
  emitKeypressEvents(stdin)
  stdin.setRawMode(true)
  stdin.on('keypress', onKey)
  stdin.resume()
  return () => {
    stdin.off('keypress', onKey)
    stdin.setRawMode(false)
    stdin.pause()
  }
}

async function fetchReport(options: ServerAddress): Promise<KvReport> {
  const answer = await askServer(options, '/debug/kv')
  if (!('kv' in answer && 'engine' in answer)) throw notLattice(options.url, 200)
  return answer as unknown as KvReport
}

function print(text: string): void {
  process.stdout.write(`${text}\n`)
}
