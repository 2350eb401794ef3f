// Owns the options that say how the datagram path is attached, for `serve` and for `lattice net`.

import { type Command, Option } from 'commander'
import { LatticeError } from '../errors.ts'
import { NET_MODES, type NetMode } from '../net/interface.ts'
import type { AttachOptions } from '../net/net-service.ts'
import { PROTOCOL_PORT } from '../net/protocol.ts'
import type { DatagramTenant } from '../net/tenants.ts'
import { parseCount } from './parse.ts'

export interface NetOptions {
  net?: string
  netTenants?: string
  netQueue?: number
  netMode?: NetMode
  netPort?: number
  netBusyPoll?: number
  netForce?: boolean
  netAllowGeneric?: boolean
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
    .option(`--${prefix}allow-generic`, 'take the next best mode if the driver cannot do this one')
    .option(`--${prefix}force`, 'also an interface that the default route leads through')
}

export function addNetOptions(command: Command): Command {
  command
    .optionsGroup('Datagrams:')
    .option('--net <IFACE>', 'serve the datagram protocol on this interface too; needs root')
    .option('--net-tenants <FILE>', 'who may ask over datagrams: keys and limits')
  return addAttachOptions(command, 'net-')
}

export interface NetChoice {
  tenants: DatagramTenant[]
  /** Undefined: `lattice net attach` may attach it later. */
  attach: AttachOptions | undefined
}

/**
 * What --net and its kin ask for, checked as far as it can be before a model is loaded; undefined
 * if they ask for nothing.
 * @throws LatticeError `usage`, `net_refused`
 */
export async function chooseNet(options: NetOptions): Promise<NetChoice | undefined> {
  const { net, netTenants } = options
  const given = Object.keys(options).filter((name) => /^net[A-Z]/.test(name))
  const alone = given.find((name) => name !== 'netTenants')
  if (net === undefined && alone !== undefined) {
    const flag = `--${alone.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`
    throw new LatticeError('usage', `${flag} has no effect without --net.`, {
      todo: 'Name the interface with --net, or leave it out.',
    })
  }
  if (netTenants === undefined) {
    if (net === undefined) return undefined
    throw new LatticeError('usage', '--net needs to know who may ask.', {
      todo: 'Name a file of tenants with --net-tenants; docs/cli.md shows its format.',
    })
  }
  const { readTenants } = await import('../net/tenants.ts')
  const tenants = readTenants(netTenants)
  if (net === undefined) return { tenants, attach: undefined }
  const attach = {
    name: net,
    queue: options.netQueue,
    mode: options.netMode ?? 'native',
    port: options.netPort ?? PROTOCOL_PORT,
    busyPollBudget: options.netBusyPoll ?? 0,
    force: options.netForce ?? false,
    allowGeneric: options.netAllowGeneric ?? false,
  }
  const { checkInterface } = await import('../net/interface.ts')
  checkInterface(attach)
  return { tenants, attach }
}
