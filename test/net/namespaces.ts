// Owns hosts for tests: network namespaces joined by a veth pair, made and removed by the test.

import { execFileSync } from 'node:child_process'

function ip(...args: string[]): void {
  execFileSync('ip', args, { stdio: ['ignore', 'ignore', 'pipe'] })
}

export interface TwoHosts {
  /** Names of the namespaces. */
  client: string
  server: string
  /** The interface of each, and its addresses. */
  clientInterface: string
  serverInterface: string
  clientAddress: string
  serverAddress: string
  remove(): void
}

let made = 0

/** @throws if this process may not make namespaces */
export function twoHosts(): TwoHosts {
  const name = `lt${process.pid}-${made++}`
  const [client, server] = [`${name}c`, `${name}s`]
  const hosts = {
    client,
    server,
    clientInterface: 'veth-c',
    serverInterface: 'veth-s',
    clientAddress: '10.99.0.1',
    serverAddress: '10.99.0.2',
    remove() {
      for (const namespace of [client, server]) ip('netns', 'del', namespace)
    },
  }
  ip('netns', 'add', client)
  ip('netns', 'add', server)
  ip('link', 'add', 'veth-c', 'netns', client, 'type', 'veth', 'peer', 'veth-s', 'netns', server)
  for (const [namespace, link, address] of [
    [client, 'veth-c', '10.99.0.1/24'],
    [server, 'veth-s', '10.99.0.2/24'],
  ] as const) {
    ip('-n', namespace, 'addr', 'add', address, 'dev', link)
    ip('-n', namespace, 'link', 'set', link, 'up')
    ip('-n', namespace, 'link', 'set', 'lo', 'up')
  }
  return hosts
}

/** The command line that runs this Node in a namespace. */
export function inNamespace(namespace: string, ...args: string[]): [string, string[]] {
  return ['ip', ['netns', 'exec', namespace, process.execPath, ...args]]
}
