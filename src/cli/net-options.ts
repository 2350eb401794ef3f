// Owns the options that say how the datagram path is attached, for `serve` and for `lattice net`.

import { type Command, InvalidArgumentError, Option } from 'commander'
import { statSync } from 'node:fs'
import { LatticeError } from '../errors.ts'
import { NET_REQUESTS_DEFAULT, NET_REQUESTS_MAX } from '../limits.ts'
import { NET_MODES, type NetMode } from '../net/interface.ts'
import type { SynRate } from '../net/ingress.ts'
import type { AttachOptions } from '../net/net-service.ts'
import { NET_RINGS, type NetRing } from '../net/ring-choice.ts'
import { PROTOCOL_PORT } from '../net/protocol.ts'
import type { DatagramTenant } from '../net/tenants.ts'
import { parseCount, parseRate } from './parse.ts'

export interface NetOptions {
  net?: string
  netTenants?: string
  netShare?: string
  netJoin?: string
  netQueue?: number
  netMode?: NetMode
  netPort?: number
  netBusyPoll?: number
  netRing?: NetRing
  netSample?: number
  netRequests?: number
  netForce?: boolean
  netAllowGeneric?: boolean
  netSyn?: SynRate
  netSynTotal?: SynRate
}

/** @param prefix of each option's name: 'net-' beside other options */
export function addAttachOptions(command: Command, prefix: '' | 'net-'): Command {
  return command
    .option(
      `--${prefix}queue <N>`,
      'serve this receive queue only (default: all of them)',
      parseCount(0, 65535),
    )
    .addOption(
      new Option(
        `--${prefix}mode <MODE>`,
        'in the driver, there without a copy, or behind it (default: native)',
      ).choices(NET_MODES),
    )
    .option(
      `--${prefix}port <PORT>`,
      `UDP port of the protocol (default: ${PROTOCOL_PORT})`,
      parseCount(1, 65535),
    )
    .option(
      `--${prefix}busy-poll <N>`,
      'ask the driver for up to N packets until 2 ms after the last (default: sleep)',
      parseCount(1, 65535),
    )
    .addOption(
      new Option(
        `--${prefix}ring <RING>`,
        'what puts prompts together (default: native where its object can be loaded)',
      ).choices(NET_RINGS),
    )
    .option(
      `--${prefix}requests <N>`,
      `remember so many, each for 30 s; the rest is busy (default: ${NET_REQUESTS_DEFAULT})`,
      parseCount(1, NET_REQUESTS_MAX),
    )
    .option(
      `--${prefix}sample <N>`,
      'tell of one decision in N, a power of two, in the log and `net events` (default: none)',
      parsePowerOfTwo,
    )
    .option(`--${prefix}allow-generic`, 'take the next best mode if the driver cannot do this one')
    .option(
      `--${prefix}syn <RATE[:BURST]>`,
      'drop new HTTP connections of a source beyond so many a second, in the driver',
      parseRate,
    )
    .option(`--${prefix}syn-total <RATE[:BURST]>`, 'the same, of all sources together', parseRate)
    .option(`--${prefix}force`, 'also an interface that the default route leads through')
}

function parsePowerOfTwo(text: string): number {
  const value = parseCount(1, 2 ** 30)(text)
  if ((value & (value - 1)) === 0) return value
  throw new InvalidArgumentError('Give a power of two: 1, 64, 1024.')
}

export function addNetOptions(command: Command): Command {
  command
    .optionsGroup('Datagrams:')
    .option('--net <IFACE>', 'serve the datagram protocol on this interface too; needs root')
    .option('--net-tenants <FILE>', 'who may ask over datagrams: keys and limits')
    .option('--net-share <PATH>', 'a socket through which other servers of this machine join')
    .option('--net-join <PATH>', 'answer datagrams behind the server that shares this socket')
  return addAttachOptions(command, 'net-')
}

export interface NetChoice {
  tenants: DatagramTenant[]
  /** Undefined: `lattice net attach` may attach it later. */
  attach: AttachOptions | undefined
  share: string | undefined
}

/** The socket of the server that owns the interface. */
export interface JoinChoice {
  join: string
}

/**
 * What --net and its kin ask for, checked as far as it can be before a model is loaded; undefined
 * if they ask for nothing.
 * @throws LatticeError `usage`, `net_refused`
 */
export async function chooseNet(
  options: NetOptions & { host: string; port: number },
): Promise<NetChoice | JoinChoice | undefined> {
  const { net, netTenants, netShare: share, netJoin: join } = options
  const { netSyn: source, netSynTotal: total, host, port } = options
  const given = Object.keys(options).filter((name) => /^net([A-Z]|$)/.test(name))
  if (join !== undefined) {
    const other = given.find((name) => name !== 'netJoin')
    if (other === undefined && isSocket(join)) return { join }
    if (other === undefined) {
      throw new LatticeError('net_refused', `There is no socket at ${join}.`, {
        todo: 'Start the server that owns the interface first, with --net-share and this path.',
      })
    }
    throw new LatticeError(
      'usage',
      `${flagOf(other)} is for who owns an interface, not joins one.`,
      {
        todo: 'Give it to the server that shares the socket, or leave --net-join out.',
      },
    )
  }
  const alone = given.find((name) => name !== 'netTenants' && name !== 'netShare')
  if (net === undefined && alone !== undefined) {
    throw new LatticeError('usage', `${flagOf(alone)} has no effect without --net.`, {
      todo: 'Name the interface with --net, or leave it out.',
    })
  }
  if (netTenants === undefined) {
    if (net === undefined && share === undefined) return undefined
    const flag = net === undefined ? '--net-share' : '--net'
    throw new LatticeError('usage', `${flag} needs to know who may ask.`, {
      todo: 'Name a file of tenants with --net-tenants; docs/cli.md shows its format.',
    })
  }
  const { readTenants } = await import('../net/tenants.ts')
  const tenants = readTenants(netTenants)
  if (net === undefined) return { tenants, attach: undefined, share }
  const attach = {
    name: net,
    queue: options.netQueue,
    mode: options.netMode ?? 'native',
    port: options.netPort ?? PROTOCOL_PORT,
    busyPollBudget: options.netBusyPoll ?? 0,
    ring: options.netRing,
    sampleEvery: options.netSample ?? 0,
    requests: options.netRequests ?? NET_REQUESTS_DEFAULT,
    force: options.netForce ?? false,
    allowGeneric: options.netAllowGeneric ?? false,
    syn: source || total ? { port, source, total } : undefined,
  }
  const [{ checkInterface }, { checkSyn }] = await Promise.all([
    import('../net/interface.ts'),
    import('../net/net-service.ts'),
  ])
  checkInterface(attach)
  if (attach.syn) checkSyn(host)
  if (attach.syn && port === 0) {
    throw new LatticeError('usage', '--net-syn needs to know the HTTP port before it is chosen.', {
      todo: 'Choose it with --port.',
    })
  }
  return { tenants, attach, share }
}

function isSocket(path: string): boolean {
  return statSync(path, { throwIfNoEntry: false })?.isSocket() ?? false
}

function flagOf(name: string): string {
  return `--${name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`
}
