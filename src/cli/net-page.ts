// Owns how a server's datagram path looks in a terminal.

import type { DatagramStatus } from '../net/datagram-server.ts'
import { formatTable } from './table.ts'

/** Counts a second between two looks. */
export interface NetRates {
  status: DatagramStatus
  before: DatagramStatus
  seconds: number
}

/** One line: where, how, for whom. Modes are the kernel's own words. */
export function netLine({
  interface: name,
  attached,
  zeroCopy,
  ...status
}: DatagramStatus): string {
  const mode = attached ? `${attached.mode} XDP (program ${attached.id})` : 'NOT ATTACHED'
  const rings = zeroCopy ? 'AF_XDP zero-copy' : 'AF_XDP copy'
  const queues =
    status.queues.length === 1 ? `queue ${status.queues[0]}` : `${status.queues.length} queues`
  return `Datagrams on ${name}, UDP port ${status.port}: ${mode}, ${rings}, ${queues}`
}

export function netPage(status: DatagramStatus, rates?: NetRates): string {
  const { counters, losses, events, failure } = status
  const names = Object.keys(counters).filter((name) => counters[name] || ALWAYS.has(name))
  const perSecond = (name: string): string[] =>
    rates
      ? [(((counters[name] ?? 0) - (rates.before.counters[name] ?? 0)) / rates.seconds).toFixed(0)]
      : []
  const title = rates ? [{ title: 'A SECOND', right: true }] : []
  return [
    netLine(status),
    ...(failure === undefined ? [] : [`FAILED: ${failure}`]),
    `${status.running} running · ${status.verified} instructions verified · lost frames:` +
      ` ${losses.received} received, ${losses.sent} sent` +
      (events.every > 0 ? ` · told of 1 decision in ${events.every}: ${events.count}` : ''),
    '',
    formatTable(
      [{ title: 'PACKETS' }, { title: 'COUNT', right: true }, ...title],
      names.map((name) => [name, String(counters[name]), ...perSecond(name)]),
    ),
    '',
    formatTable(
      [
        { title: 'TENANT' },
        { title: 'NUMBER', right: true },
        { title: 'RUNNING', right: true },
        { title: 'GRANTED', right: true },
        { title: 'REJECTED', right: true },
        { title: 'TOKENS', right: true },
      ],
      status.tenants.map(({ name, index, running, granted, rejected, chargedTokens }) =>
        [name, index, running, granted, rejected, chargedTokens].map(String),
      ),
    ),
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

/** Shown even when there were none. */
const ALWAYS = new Set(['passed', 'hello', 'granted', 'rejected', 'forwarded'])
