// Owns how a server's datagram path looks in a terminal.

import { fileURLToPath } from 'node:url'
import type { DatagramStatus } from '../net/datagram-server.ts'
import { ADDRESSES_MAX } from '../net/ingress-maps.ts'
import type { SynRate } from '../net/ingress.ts'
import { MESSAGE_CODES } from '../net/protocol.ts'
import { formatTable } from './table.ts'

const TESTING = new URL('../../bpf/testing.o', import.meta.url)

/** Counts a second between two looks. */
export interface NetRates {
  before: DatagramStatus
  seconds: number
}

/** Where, how, for whom. Modes are the kernel's own words. */
function netLines(status: DatagramStatus): string[] {
  const { interface: name, attached, zeroCopy, syn } = status
  const mode = attached ? `${attached.mode} XDP (program ${attached.id})` : 'NOT ATTACHED'
  const { ring, why } = status.ring
  const rings = `AF_XDP ${zeroCopy ? 'zero-copy' : 'copy'}, ${RINGS[ring]}`
  const queues =
    status.queues.length === 1 ? `queue ${status.queues[0]}` : `${status.queues.length} queues`
  return [
    `Datagrams on ${name}, UDP port ${status.port}: ${mode}, ${rings}, ${queues}`,
    ...(why === undefined ? [] : [`The native ring cannot be loaded: ${why}`]),
    ...(status.addresses === 0 ? [ANY_ADDRESS] : []),
    ...(syn ? [synLine(syn)] : []),
  ]
}

/** What is said when it was attached. */
export function attachedLines(status: DatagramStatus): string {
  const isPair = status.isPair && status.attached?.mode === 'native'
  return [...netLines(status), ...(isPair ? [PAIR] : [])].join('\n')
}

const RINGS = { native: 'native ring', typescript: 'ring in TypeScript' } as const

const ANY_ADDRESS =
  'It answers for any address, also of other machines: the interface has none, or over ' +
  `${ADDRESSES_MAX}.`

const PAIR =
  'It is one end of a veth pair, so no answer arrives unless the other end has an XDP program ' +
  `too:\n  ip link set dev PEER xdp object ${fileURLToPath(TESTING)} program pass\n` +
  '  (or attach with the mode generic)'

export function netPage(status: DatagramStatus, rates?: NetRates): string {
  const { losses, events, failure } = status
  const lost = losses.received + losses.sent
  return [
    ...netLines(status),
    ...(failure === undefined ? [] : [`FAILED: ${failure}`]),
    `${status.running} running` +
      (lost > 0 ? ` · lost frames: ${losses.received} received, ${losses.sent} sent` : '') +
      (events.every > 0 ? ` · told of 1 decision in ${events.every}: ${events.count}` : ''),
    '',
    packetTable(status, rates),
    '',
    tenantTable(status, rates),
    '',
    formatTable(
      [
        { title: 'REPLICA' },
        { title: 'PROCESS' },
        { title: 'RUNNING', right: true },
        { title: 'OTHERS', right: true },
        { title: 'PREFIXES', right: true },
        { title: 'READY' },
      ],
      status.replicas.map(({ model, process: pid, running, others, prefixes, ready }) => {
        const counts = [running, others, prefixes].map(String)
        return [model, pid ? `${pid}` : 'own', ...counts, ready ? 'yes' : 'no']
      }),
    ),
  ].join('\n')
}

function synLine({ port, source, total }: NonNullable<DatagramStatus['syn']>): string {
  const limit = (rate: SynRate | undefined, whose: string) =>
    rate ? [`${rate.perSecond} a second of ${whose}, ${rate.burst} at once`] : []
  const limits = [...limit(source, 'one source'), ...limit(total, 'all')]
  return `New connections to TCP port ${port}: ${limits.join('; ')}`
}

/** A count, and what it is the sum of. */
interface Count {
  name: string
  of?: readonly Count[]
  /** Shown even when there were none. */
  always?: true
}

const REFUSALS = Object.keys(MESSAGE_CODES).map((name) => ({ name }))
const PACKETS: readonly Count[] = [
  { name: 'passed', always: true },
  {
    name: 'hello',
    always: true,
    of: [
      { name: 'granted', always: true },
      { name: 'repeated' },
      { name: 'rejected', always: true, of: REFUSALS },
    ],
  },
  { name: 'forwarded', always: true },
  ...['bad_header', 'bad_mac', 'bad_type', 'bad_cookie', 'stale', 'no_ring'].map((name) => ({
    name,
  })),
  { name: 'syn', of: [{ name: 'syn_source' }, { name: 'syn_total' }] },
  { name: 'events_lost' },
]

function packetTable({ counters }: DatagramStatus, rates?: NetRates): string {
  const rows: string[][] = []
  const add = (counts: readonly Count[], indent: string): void => {
    for (const { name, of = [], always } of counts) {
      const count = counters[name] ?? 0
      if (count === 0 && !always) continue
      const row = [indent + name, String(count)]
      if (rates) row.push(perSecond(count - (rates.before.counters[name] ?? 0), rates))
      rows.push(row)
      add(of, `${indent}  `)
    }
  }
  add(PACKETS, '')
  const columns = [{ title: 'PACKETS' }, { title: 'COUNT', right: true }]
  return formatTable(rates ? [...columns, { title: 'A SECOND', right: true }] : columns, rows)
}

function tenantTable({ tenants }: DatagramStatus, rates?: NetRates): string {
  const titles = 'NUMBER RUNNING GRANTED REJECTED CHARGED TOKENS BYTES REPEATS'.split(' ')
  // Frames of a paced tenant that would have left too late.
  const isLate = tenants.some(({ sent }) => sent.overdue > 0)
  const before = new Map(rates?.before.tenants.map(({ index, sent }) => [index, sent.tokens]))
  const rows = tenants.map(({ name, index, running, granted, rejected, chargedTokens, sent }) => {
    const { tokens, bytes, repeats, overdue } = sent
    const counts = [index, running, granted, rejected, chargedTokens, tokens, bytes, repeats]
    const row = [name, ...counts.map(String)]
    if (isLate) row.push(String(overdue))
    if (rates) row.push(perSecond(tokens - (before.get(index) ?? 0), rates))
    return row
  })
  const more = [...(isLate ? ['OVERDUE'] : []), ...(rates ? ['TOKENS/S'] : [])]
  const numbers = [...titles, ...more].map((title) => ({ title, right: true }))
  return formatTable([{ title: 'TENANT' }, ...numbers], rows)
}

function perSecond(count: number, { seconds }: NetRates): string {
  return (count / seconds).toFixed(0)
}
