// Owns `lattice net events`: the decisions of a server's ingress program, as they are made.

import { Command } from 'commander'
import { setTimeout as sleep } from 'node:timers/promises'
import { LatticeError } from '../errors.ts'
import { describeEvent, type NetEvent } from '../net/decisions.ts'
import { EXIT_INTERRUPTED } from './report.ts'
import { addServerOptions, askServer, notLattice, type ServerAddress } from './server-client.ts'
import { interruptible } from './terminal.ts'

interface EventsFlags extends ServerAddress {
  json?: boolean
  follow?: boolean
}

interface Told {
  events: (NetEvent & { name: string })[]
  /** 0: the program tells of none. */
  every: number
  /** It had no room for so many. */
  lost: number
}

const PATH = '/debug/net/events'
const INTERVAL_MS = 200

export function eventsCommand(): Command {
  return addServerOptions(new Command('events'))
    .description(
      'Shows decisions about requests in the driver, the latest thousand of those that it tells' +
        ' of: one in N with --net-sample N (for `lattice net attach`, --sample N).',
    )
    .option('-f, --follow', 'go on with what is decided next, until Ctrl-C')
    .option('--json', 'one JSON object a line')
    .action(events)
}

async function events(flags: EventsFlags): Promise<void> {
  let { last, lost } = await show(flags, { last: 0, lost: 0 })
  if (!flags.follow) return
  await interruptible(async (interrupt) => {
    while (!interrupt.aborted) {
      await sleep(INTERVAL_MS, undefined, { signal: interrupt }).catch(() => {})
      if (!interrupt.aborted) ({ last, lost } = await show(flags, { last, lost }))
    }
  })
  process.exitCode = EXIT_INTERRUPTED
}

interface Seen {
  last: number
  lost: number
}

/** Prints what is new. */
async function show(flags: EventsFlags, seen: Seen): Promise<Seen> {
  const answer = await askServer(flags, `${PATH}?after=${seen.last}`)
  const told = answer as unknown as Told
  if (!Array.isArray(told.events)) throw notLattice(flags.url, 200)
  if (told.every === 0) {
    throw new LatticeError('not_found', 'No decision is told of: sampling is off.', {
      todo: 'Attach with --sample 1 (for serve, --net-sample), or a larger power of two.',
    })
  }
  for (const event of told.events) print(event, flags)
  if (told.lost > seen.lost) {
    process.stderr.write(`${told.lost - seen.lost} were lost: there was no room for them\n`)
  }
  return { last: told.events.at(-1)?.number ?? seen.last, lost: told.lost }
}

function print(event: NetEvent & { name: string }, { json }: EventsFlags): void {
  const time = new Date(event.timeMs).toISOString().slice(11, 23)
  const line = json ? JSON.stringify(event) : `${time} ${describeEvent(event, event.name)}`
  process.stdout.write(`${line}\n`)
}
