// Owns `lattice net`: a running server's datagram path, attached, detached, shown and watched.

import { Command } from 'commander'
import { setTimeout as sleep } from 'node:timers/promises'
import { LatticeError } from '../errors.ts'
import type { DatagramStatus } from '../net/datagram-server.ts'
import type { SynRate } from '../net/ingress.ts'
import type { NetMode } from '../net/interface.ts'
import type { NetRing } from '../net/ring-choice.ts'
import { eventsCommand } from './net-events.ts'
import { addAttachOptions } from './net-options.ts'
import { attachedLines, netPage } from './net-page.ts'
import { EXIT_INTERRUPTED } from './report.ts'
import { addServerOptions, askServer, notLattice, type ServerAddress } from './server-client.ts'
import { borrowTerminal, interruptible } from './terminal.ts'

interface AttachFlags extends ServerAddress {
  queue?: number
  mode?: NetMode
  port?: number
  busyPoll?: number
  ring?: NetRing
  requests?: number
  sample?: number
  force?: boolean
  allowGeneric?: boolean
  syn?: SynRate
  synTotal?: SynRate
}

const PATH = '/debug/net'
const INTERVAL_MS = 1000
const ALTERNATE_SCREEN = '\x1b[?1049h\x1b[?25l'
const NORMAL_SCREEN = '\x1b[?25h\x1b[?1049l'
const HOME_AND_CLEAR = '\x1b[H\x1b[J'

export function netCommand(): Command {
  return new Command('net')
    .description(
      'Attaches the datagram path of a running server to a network interface of its machine, and' +
        ' shows what it does. The server needs --net-tenants, root, and libbpf.',
    )
    .addCommand(attachCommand())
    .addCommand(
      addServerOptions(new Command('detach'))
        .description('Lets running answers arrive, then leaves the interface as it was.')
        .action(detach),
    )
    .addCommand(
      addServerOptions(new Command('status'))
        .description('Shows where it is attached and how (the kernel is asked), and its counters.')
        .option('--json', "print the server's own JSON")
        .action(status),
    )
    .addCommand(
      addServerOptions(new Command('top'))
        .description('Shows the same each second, with rates, until Ctrl-C.')
        .action(top),
    )
    .addCommand(eventsCommand())
}

function attachCommand(): Command {
  const command = new Command('attach')
    .description(
      'Attaches it. Nothing is taken over in silence: another XDP program, the default route’s' +
        ' interface, and a mode that the driver lacks are refused.',
    )
    .argument('<IFACE>', 'as `ip link` names it')
  return addServerOptions(addAttachOptions(command, '')).action(attach)
}

async function attach(name: string, flags: AttachFlags): Promise<void> {
  const { queue, mode, port, busyPoll, ring, requests, sample, force, allowGeneric } = flags
  const body = {
    interface: name,
    queue,
    mode,
    port,
    busy_poll: busyPoll,
    ring,
    requests,
    sample_every: sample,
    force,
    allow_generic: allowGeneric,
    syn: rateBody(flags.syn),
    syn_total: rateBody(flags.synTotal),
  }
  print(attachedLines(statusOf(await askServer(flags, PATH, { body }), flags)))
}

function rateBody(rate: SynRate | undefined): object | undefined {
  return rate && { per_second: rate.perSecond, burst: rate.burst }
}

async function detach(address: ServerAddress): Promise<void> {
  await askServer(address, PATH, { method: 'DELETE' })
  print('Detached.')
}

async function status(options: ServerAddress & { json?: boolean }): Promise<void> {
  const answer = await askServer(options, PATH)
  print(options.json ? JSON.stringify(answer['net']) : netPage(statusOf(answer, options)))
}

async function top(address: ServerAddress): Promise<void> {
  let before = await look(address)
  const restore = process.stdout.isTTY ? borrowTerminal(ALTERNATE_SCREEN, NORMAL_SCREEN) : () => {}
  try {
    await interruptible(async (interrupt) => {
      while (!interrupt.aborted) {
        await sleep(INTERVAL_MS, undefined, { signal: interrupt }).catch(() => {})
        if (interrupt.aborted) break
        const now = await look(address)
        if (process.stdout.isTTY) process.stdout.write(HOME_AND_CLEAR)
        const seconds = (now.atMs - before.atMs) / 1000
        print(netPage(now.status, { before: before.status, seconds }))
        if (!process.stdout.isTTY) print('')
        before = now
      }
    })
    process.exitCode = EXIT_INTERRUPTED
  } finally {
    restore()
  }
}

async function look(address: ServerAddress): Promise<{ status: DatagramStatus; atMs: number }> {
  const found = statusOf(await askServer(address, PATH), address)
  return { status: found, atMs: performance.now() }
}

function statusOf(answer: Record<string, unknown>, { url }: ServerAddress): DatagramStatus {
  if (!('net' in answer)) throw notLattice(url, 200)
  if (answer['net'] !== null) return answer['net'] as DatagramStatus
  throw new LatticeError('not_found', `The server at ${url} is attached to no interface.`, {
    todo: 'Attach it: lattice net attach IFACE',
  })
}

function print(text: string): void {
  process.stdout.write(`${text}\n`)
}
