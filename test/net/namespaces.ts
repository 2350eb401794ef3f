// Owns hosts for tests: network namespaces joined by a veth pair, with a process in each, made and
// removed by the test.

import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { RemoteCalls } from '../../src/bench/remote-calls.ts'
import type { COMMANDS } from './host.ts'
import type { World } from './relay.ts'

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

export interface ThreeHosts {
  clients: [Host, Host]
  server: Host
  router: Host
  remove(): Promise<void>
}

/**
 * Two clients' hosts and a server's, each in a network of its own, and a router between them whose
 * process sees what goes through (`badly`). The server's link has the least MTU there may be.
 * @throws if this process may not make namespaces, or the kernel has no TUN devices
 */
export async function threeHosts(world: World): Promise<ThreeHosts> {
  const name = `lt${process.pid}-${made++}`
  const far = `${name}r`
  const links = [1, 2, 0].map((net) => ({
    namespace: `${name}${net === 0 ? 's' : `c${net}`}`,
    net,
    near: net === 0 ? 'veth-s' : 'veth-c',
    there: `veth-${net}`,
  }))
  const all: Host[] = []
  const remove = async (): Promise<void> => {
    await Promise.all(all.map((host) => host.end()))
    const there = ip('netns', 'list')
    for (const each of [far, ...links.map(({ namespace }) => namespace)]) {
      if (there.includes(each)) ip('netns', 'del', each)
    }
  }
  try {
    ip('netns', 'add', far)
    for (const { namespace, net, near, there } of links) {
      ip('netns', 'add', namespace)
      const peer = ['peer', there, 'netns', far, 'numrxqueues', '1', 'numtxqueues', '1']
      ip('link', 'add', near, 'netns', namespace, 'type', 'veth', ...peer)
      const ends = [
        [namespace, near, net === 0 ? 2 : 1],
        [far, there, 254],
      ] as const
      for (const [inside, link, host] of ends) {
        ip('-n', inside, 'addr', 'add', `10.99.${net}.${host}/24`, 'dev', link)
        ip('-n', inside, 'addr', 'add', `fd99:${net}::${host}/64`, 'dev', link, 'nodad')
        ip('-n', inside, 'link', 'set', link, 'up', 'mtu', net === 0 ? '1344' : '1500')
      }
      // No default route: a server refuses the interface that has it.
      ip('-n', namespace, 'route', 'add', '10.99.0.0/16', 'via', `10.99.${net}.254`)
      ip('-n', namespace, 'route', 'add', 'fd99::/16', 'via', `fd99:${net}::254`)
      all.push(new Host(namespace, near, `10.99.${net}.${net === 0 ? 2 : 1}`))
    }
    const router = new Host(far, 'veth-0', '10.99.0.254')
    all.push(router)
    await router.call('forward')
    await router.call('pass', 'veth-0')
    await router.call('badly', 'bad', world)
    ip('-n', far, 'link', 'set', 'bad', 'up')
    for (const { there } of links) {
      for (const family of ['-4', '-6']) {
        ip(family, '-n', far, 'rule', 'add', 'iif', there, 'lookup', '100')
      }
    }
    for (const family of ['-4', '-6']) {
      ip(family, '-n', far, 'route', 'add', 'default', 'dev', 'bad', 'table', '100')
    }
    const [one, two, server] = all as [Host, Host, Host]
    return { clients: [one, two], server, router, remove }
  } catch (thrown) {
    await remove()
    throw thrown
  }
}

/** 10.99.0.1 is fd99::1 as well. */
function sixOf(address: string): string {
  return `fd99::${address.split('.').at(-1)}`
}

/** The command line that runs this Node in a namespace. */
export function inNamespace(namespace: string, ...args: string[]): [string, string[]] {
  return ['ip', ['netns', 'exec', namespace, process.execPath, ...args]]
}
