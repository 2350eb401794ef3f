// Owns what is asked of a network interface before a program is attached to it: whether it is
// there, whether the machine itself lives on it, who else is attached.

import { execFileSync } from 'node:child_process'
import { existsSync, globSync, readdirSync, readFileSync } from 'node:fs'
import { networkInterfaces } from 'node:os'
import { getSystemErrorMessage } from 'node:util'
import { LatticeError } from '../errors.ts'
import { type AttachedXdp, attachedXdp } from '../ffi/libbpf.ts'
import { interfaceIndex } from '../ffi/xdp-socket.ts'
import { addressBytes } from './connection-key.ts'
import { ADDRESSES_MAX, QUEUES_MAX } from './ingress-maps.ts'
import { FRAGMENT_BYTES, HEADER_BYTES } from './protocol.ts'

/** An IP packet of the largest datagram, over IPv6. */
export const MTU_MIN = 40 + 8 + HEADER_BYTES + FRAGMENT_BYTES
/** Beyond it a frame may not fit the page that a driver gives to XDP. */
const MTU_USUAL = 1500

/** generic is behind the driver, where every packet has a socket buffer already. */
export const NET_MODES = ['native', 'zerocopy', 'generic'] as const
export type NetMode = (typeof NET_MODES)[number]

export interface InterfaceChoice {
  name: string
  /** One of its receive queues; undefined is all of them. */
  queue: number | undefined
  /** Also the one that the default route leads through. */
  force: boolean
}

export interface CheckedInterface {
  name: string
  index: number
  queues: number[]
  mtu: number
  /** One end of a veth pair: its driver sends an answer only to an end that has XDP too. */
  isPair: boolean
}

/** @throws LatticeError `net_refused` with what speaks against it */
export function checkInterface({ name, queue, force }: InterfaceChoice): CheckedInterface {
  const index = interfaceIndex(name)
  if (index === 0) {
    throw refused(`There is no interface '${name}'.`, '`ip link` lists those there are.')
  }
  const way = stackOn(name).find(isDefaultRoute)
  if (!force && way !== undefined) {
    const through = way === name ? name : `${way}, which is on ${name}`
    throw refused(
      `The default route leads through ${through}: a mistake could cut this machine off.`,
      'Choose another interface, or insist (--force; for serve, --net-force).',
    )
  }
  const other = attachedXdp(index)
  if (other) throw taken(name, other)
  const mtu = Number(readFileSync(`/sys/class/net/${name}/mtu`, 'utf8'))
  if (mtu < MTU_MIN) {
    throw refused(
      `${name} has an MTU of ${mtu} bytes; the protocol’s datagrams need ${MTU_MIN}.`,
      `Raise it: ip link set ${name} mtu ${MTU_USUAL}`,
    )
  }
  const all = queuesOf(name)
  if (queue !== undefined && !all.includes(queue)) {
    throw refused(
      `${name} has no receive queue ${queue}.`,
      all.length === 1
        ? 'Leave it out: there is only queue 0.'
        : `Choose one of 0 to ${all.length - 1}, or leave it out for all of them.`,
    )
  }
  const queues = queue === undefined ? all : [queue]
  if (queues.length > QUEUES_MAX || (queues.at(-1) ?? 0) >= QUEUES_MAX) {
    throw refused(
      `${name} has ${all.length} receive queues; ${QUEUES_MAX} are supported.`,
      `Give it fewer: ethtool -L ${name} combined ${QUEUES_MAX}`,
    )
  }
  return { name, index, queues, mtu, isPair: isPair(name) }
}

export function taken(name: string, { id, mode, name: program }: AttachedXdp): LatticeError {
  const what = program === '' ? `program ${id}` : `program ${id}, "${program}"`
  return refused(
    `Another XDP program is attached to ${name}: ${what}, ${mode}.`,
    `Detach it first (ip link set ${name} xdp off, or end the process that holds its link).`,
  )
}

/** The driver has not got a mode, as an error that says what would help. */
export function lacking(
  { name, mtu }: CheckedInterface,
  mode: NetMode,
  cause: unknown,
): LatticeError {
  const lower =
    mtu > MTU_USUAL ? `Its MTU is ${mtu}; try it with ip link set ${name} mtu ${MTU_USUAL}. ` : ''
  return refused(
    `${name} cannot do ${mode}: its driver has no ${MODE_NAMES[mode]}.`,
    lower + INSTEAD[mode],
    cause,
  )
}

const MODE_NAMES = { native: 'XDP', zerocopy: 'AF_XDP without a copy', generic: 'generic XDP' }
const INSTEAD = {
  native: 'Use --mode generic, or --allow-generic for the best there is (for serve: --net-…).',
  zerocopy: 'Use --mode native, or --allow-generic for the best there is (for serve: --net-…).',
  generic: 'Use another interface.',
}

/** What the kernel said, in words. */
export function reason(thrown: unknown): string {
  const { errno } = thrown instanceof LatticeError ? thrown.details : {}
  return typeof errno === 'number' ? getSystemErrorMessage(-errno) : String(thrown)
}

export function refused(what: string, todo: string, cause?: unknown): LatticeError {
  return new LatticeError('net_refused', what, { todo, cause })
}

/** An address that only this machine reaches. */
export function isLoopback(host: string): boolean {
  return host === 'localhost' || host === '::1' || host.startsWith('127.')
}

/** The addresses of an interface, and of what is stacked on it, as the program compares them. */
export function addressesOf(name: string): Uint8Array[] {
  const interfaces = networkInterfaces()
  const list = stackOn(name).flatMap((each) => interfaces[each] ?? [])
  // More than it knows are none: then it answers for any.
  return list.length > ADDRESSES_MAX ? [] : list.map(({ address }) => addressBytes(address))
}

/** An interface and those above it that its frames reach: VLANs, a bridge, a bond. */
function stackOn(name: string): string[] {
  const folder = `/sys/class/net/${name}`
  // It may have vanished.
  const files = existsSync(folder) ? readdirSync(folder) : []
  const uppers = files.filter((file) => file.startsWith('upper_'))
  return [name, ...uppers.flatMap((file) => stackOn(file.slice('upper_'.length)))]
}

/** RTF_REJECT: a route that leads nowhere. */
const REJECTS = 0x200

function isDefaultRoute(name: string): boolean {
  const lines = (path: string) => readFileSync(path, 'utf8').trimEnd().split('\n')
  const isZero = (hex = '') => /^0+$/.test(hex)
  // Interface, destination, gateway, flags, reference count, uses, metric, mask.
  const four = lines('/proc/net/route').map((line) => line.split('\t'))
  if (four.some((row) => row[0] === name && isZero(row[1]) && isZero(row[7]))) return true
  // Destination and its bits, source and its bits, gateway, metric, two counts, flags, interface.
  const six = lines('/proc/net/ipv6_route').map((line) => line.trim().split(/\s+/))
  return six.some((row) => {
    const leads = (Number.parseInt(row[8] ?? '', 16) & REJECTS) === 0
    return row[9] === name && isZero(row[0]) && isZero(row[1]) && leads
  })
}

/** Only for a hint: without `ip` there is none. */
function isPair(name: string): boolean {
  try {
    const argv = ['-d', '-j', 'link', 'show', 'dev', name]
    const text = execFileSync('ip', argv, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] })
    const [link] = JSON.parse(text) as { linkinfo?: { info_kind?: string } }[]
    return link?.linkinfo?.info_kind === 'veth'
  } catch {
    return false
  }
}

/** Receive queues, ascending. */
function queuesOf(name: string): number[] {
  const folders = globSync(`/sys/class/net/${name}/queues/rx-*`)
  return folders.map((folder) => Number(folder.split('-').at(-1))).toSorted((a, b) => a - b)
}
