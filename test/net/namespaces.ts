// Owns hosts for tests: network namespaces joined by a veth pair, with a process in each, made and
// removed by the test.

import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { RemoteCalls } from '../../src/bench/remote-calls.ts'
import type { COMMANDS } from './host.ts'

const HOST = fileURLToPath(new URL('host.ts', import.meta.url))

type Commands = typeof COMMANDS

/** Why tests of this kind are skipped; false where they run. */
export const WITHOUT_ROOT: string | false =
  process.getuid?.() === 0 ? false : 'SKIPPED: network namespaces and BPF programs need root'

export function ip(...args: string[]): string {
  return execFileSync('ip', args, { stdio: ['ignore', 'pipe', 'pipe'], encoding: 'utf8' })
}

/** A process in a namespace. */
export class Host {
  readonly namespace: string
  readonly link: string
  readonly address: string
  readonly address6: string
  readonly child: ChildProcess
  private readonly calls: RemoteCalls<Commands>

  constructor(namespace: string, link: string, address: string) {
    this.namespace = namespace
    this.link = link
    this.address = address
    this.address6 = sixOf(address)
    const [command, args] = inNamespace(namespace, HOST)
    this.child = spawn(command, args, {
      stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
      serialization: 'advanced',
    })
    this.calls = new RemoteCalls(this.child, namespace)
  }

  /** Has the process do something; what it throws is thrown here. */
  call<N extends keyof Commands>(
    command: N,
    ...args: Parameters<Commands[N]>
  ): Promise<Awaited<ReturnType<Commands[N]>>> {
    return this.calls.call(command, ...args)
  }

  /** What the kernel says of its interface. */
  details(): string {
    return ip('-n', this.namespace, '-d', 'link', 'show', this.link)
  }

  route(...args: string[]): void {
    ip('-n', this.namespace, 'route', 'add', ...args)
  }

  async end(signal: NodeJS.Signals = 'SIGKILL'): Promise<void> {
    if (this.child.exitCode !== null || this.child.signalCode !== null) return
    const exited = new Promise((resolve) => this.child.once('exit', resolve))
    this.child.kill(signal)
    await exited
  }
}

export interface TwoHosts {
  client: Host
  server: Host
  remove(): Promise<void>
}

let made = 0

/**
 * Two hosts, the client's interface ready for answers by XDP.
 * @param queues receive queues of the server's interface
 * @throws if this process may not make namespaces
 */
export async function twoHosts(queues = 1): Promise<TwoHosts> {
  const name = `lt${process.pid}-${made++}`
  const [client, server] = [`${name}c`, `${name}s`]
  const numbers = ['numrxqueues', `${queues}`, 'numtxqueues', `${queues}`]
  ip('netns', 'add', client)
  ip('netns', 'add', server)
  const peer = ['peer', 'veth-s', 'netns', server, ...numbers]
  ip('link', 'add', 'veth-c', 'netns', client, ...numbers, 'type', 'veth', ...peer)
  for (const [namespace, link, address] of [
    [client, 'veth-c', '10.99.0.1/24'],
    [server, 'veth-s', '10.99.0.2/24'],
  ] as const) {
    ip('-n', namespace, 'addr', 'add', address, 'dev', link)
    const [four = ''] = address.split('/')
    ip('-n', namespace, 'addr', 'add', `${sixOf(four)}/64`, 'dev', link, 'nodad')
    ip('-n', namespace, 'link', 'set', link, 'up')
    ip('-n', namespace, 'link', 'set', 'lo', 'up')
  }
  const both = [new Host(client, 'veth-c', '10.99.0.1'), new Host(server, 'veth-s', '10.99.0.2')]
  const [clientHost, serverHost] = both as [Host, Host]
  const remove = async (): Promise<void> => {
    await Promise.all(both.map((host) => host.end()))
    for (const namespace of [client, server]) ip('netns', 'del', namespace)
  }
  await clientHost.call('pass', 'veth-c')
  return { client: clientHost, server: serverHost, remove }
}

/** 10.99.0.1 is fd99::1 as well. */
function sixOf(address: string): string {
  return `fd99::${address.split('.').at(-1)}`
}

/** The command line that runs this Node in a namespace. */
export function inNamespace(namespace: string, ...args: string[]): [string, string[]] {
  return ['ip', ['netns', 'exec', namespace, process.execPath, ...args]]
}
