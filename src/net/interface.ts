// Owns what is asked of a network interface before a program is attached to it: whether it is
// there, whether the machine itself lives on it, who else is attached.

import { globSync, readFileSync } from 'node:fs'
import { networkInterfaces } from 'node:os'
import { LatticeError } from '../errors.ts'
import { type AttachedXdp, attachedXdp } from '../ffi/libbpf.ts'
import { interfaceIndex } from '../ffi/xdp-socket.ts'
import { addressBytes } from './connection-key.ts'
import { ADDRESSES_MAX, QUEUES_MAX } from './ingress-maps.ts'

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
}

/** @throws LatticeError `net_refused` with what speaks against it */
export function checkInterface({ name, queue, force }: InterfaceChoice): CheckedInterface {
  const index = interfaceIndex(name)
  if (index === 0) {
    throw refused(`There is no interface '${name}'.`, '`ip link` lists those there are.')
  }
  if (!force && isDefaultRoute(name)) {
    throw refused(
      `The default route leads through ${name}: a mistake could cut this machine off.`,
      'Choose another interface, or insist (--force; for serve, --net-force).',
    )
  }
  const other = attachedXdp(index)
  if (other) throw taken(name, other)
  const all = queuesOf(name)
  if (queue !== undefined && !all.includes(queue)) {
    throw refused(
      `${name} has no receive queue ${queue}.`,
      `Choose one of 0 to ${all.length - 1}, or leave it out for all of them.`,
    )
  }
  const queues = queue === undefined ? all : [queue]
  if (queues.length > QUEUES_MAX || (queues.at(-1) ?? 0) >= QUEUES_MAX) {
    throw refused(
      `${name} has ${all.length} receive queues; ${QUEUES_MAX} are supported.`,
      `Give it fewer: ethtool -L ${name} combined ${QUEUES_MAX}`,
    )
  }
  return { name, index, queues }
}

export function taken(name: string, { id, mode, name: program }: AttachedXdp): LatticeError {
  const what = program === '' ? `program ${id}` : `program ${id}, "${program}"`
  return refused(
    `Another XDP program is attached to ${name}: ${what}, ${mode}.`,
    `Detach it first (ip link set ${name} xdp off, or end the process that holds its link).`,
  )
}

export function refused(what: string, todo: string, cause?: unknown): LatticeError {
  return new LatticeError('net_refused', what, { todo, cause })
}

/** The addresses of an interface as the program compares them. */
export function addressesOf(name: string): Uint8Array[] {
  const list = networkInterfaces()[name] ?? []
  // More than it knows are none: then it answers for any.
  return list.length > ADDRESSES_MAX ? [] : list.map(({ address }) => addressBytes(address))
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

/** Receive queues, ascending. */
function queuesOf(name: string): number[] {
  const folders = globSync(`/sys/class/net/${name}/queues/rx-*`)
  return folders.map((folder) => Number(folder.split('-').at(-1))).toSorted((a, b) => a - b)
}
