// Owns the two hosts of the bench: network namespaces joined by a veth pair, a process in each, all
// pinned to their own core, and the compiled clients. Everything goes when the bench ends.

import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { LatticeError } from '../../errors.ts'
import { RemoteCalls } from '../remote-calls.ts'
import type { COMMANDS } from './host.ts'

const HOST = fileURLToPath(new URL('host.ts', import.meta.url))
const SOURCES = ['clients', 'deliver'] as const

type Commands = typeof COMMANDS

/** What a client measured; times in µs, CPU and wall time in ns a request. */
export interface Measured {
  count: number
  p50_us: number
  p90_us: number
  p99_us: number
  p999_us: number
  max_us: number
  wall_ns: number
  cpu_ns: number
  grants: number
  rejects: number
}

function ip(...args: string[]): string {
  return execFileSync('ip', args, { stdio: ['ignore', 'pipe', 'pipe'], encoding: 'utf8' })
}

/** One end: its namespace, its interface, its core. */
export class End {
  readonly namespace: string
  readonly link: string
  readonly address: string
  readonly cpu: number
  private host: ChildProcess | undefined
  private calls: RemoteCalls<Commands> | undefined

  constructor(namespace: string, link: string, address: string, cpu: number) {
    this.namespace = namespace
    this.link = link
    this.address = address
    this.cpu = cpu
  }

  get mac(): string {
    const links = JSON.parse(ip('-n', this.namespace, '-j', 'link', 'show', this.link))
    return (links as { address: string }[])[0]!.address
  }

  /** A command line that runs in the namespace, on the core. */
  inside(...command: string[]): [string, string[]] {
    return ['taskset', ['-c', `${this.cpu}`, 'ip', 'netns', 'exec', this.namespace, ...command]]
  }

  call<N extends keyof Commands>(
    command: N,
    ...args: Parameters<Commands[N]>
  ): Promise<Awaited<ReturnType<Commands[N]>>> {
    this.calls ??= this.start()
    return this.calls.call(command, ...args)
  }

  end(): void {
    this.host?.kill('SIGKILL')
  }

  private start(): RemoteCalls<Commands> {
    const [command, args] = this.inside(process.execPath, HOST)
    this.host = spawn(command, args, { stdio: ['ignore', 'inherit', 'inherit', 'ipc'] })
    return new RemoteCalls(this.host, this.link)
  }
}

export interface Delivering {
  begin(): void
  /** When all have been answered. */
  done: Promise<Measured>
}

export class World implements Disposable {
  readonly client: End
  readonly server: End
  readonly folder: string
  private readonly children = new Set<ChildProcess>()

  /** @throws LatticeError `backend_unavailable` without root, gcc or two cores */
  constructor() {
    if (process.getuid?.() !== 0) throw missing('root', 'Run it as root.')
    this.folder = mkdtempSync(join(tmpdir(), 'lattice-ingress-'))
    try {
      for (const name of SOURCES) {
        const source = fileURLToPath(new URL(`./${name}.c`, import.meta.url))
        execFileSync('gcc', ['-O2', '-o', this.program(name), source], { stdio: 'pipe' })
      }
    } catch (cause) {
      throw missing('gcc', 'Install gcc: the clients are in C, to measure the kernel alone.', cause)
    }
    const name = `lt-bench-${process.pid}`
    this.client = new End(`${name}-c`, 'veth-c', '10.99.0.1', 1)
    this.server = new End(`${name}-s`, 'veth-s', '10.99.0.2', 0)
    for (const { namespace } of [this.client, this.server]) ip('netns', 'add', namespace)
    const one = ['numrxqueues', '1', 'numtxqueues', '1']
    const peer = ['peer', this.server.link, 'netns', this.server.namespace, ...one]
    const link = ['link', 'add', this.client.link, 'netns', this.client.namespace, ...one]
    ip(...link, 'type', 'veth', ...peer)
    for (const end of [this.client, this.server]) {
      ip('-n', end.namespace, 'addr', 'add', `${end.address}/24`, 'dev', end.link)
      ip('-n', end.namespace, 'link', 'set', end.link, 'up')
      ip('-n', end.namespace, 'link', 'set', 'lo', 'up')
    }
  }

  /** A second process at the client's end, on the server's core. */
  reader(): End {
    const { namespace, link, address } = this.client
    return new End(namespace, link, address, this.server.cpu)
  }

  /** Runs a C client to its end. */
  async measure(...args: (string | number)[]): Promise<Measured> {
    const [command, rest] = this.client.inside(this.program('clients'), ...args.map(String))
    const child = this.own(spawn(command, rest, { stdio: ['ignore', 'pipe', 'inherit'] }))
    let output = ''
    child.stdout.on('data', (chunk) => (output += String(chunk)))
    const [code] = (await once(child, 'close')) as [number]
    if (code !== 0) throw new LatticeError('backend_failed', `A client failed: ${args.join(' ')}`)
    return JSON.parse(output) as Measured
  }

  /** Starts the client that brings prompts; it begins when it is told to. */
  async deliver(...args: (string | number)[]): Promise<Delivering> {
    const [command, rest] = this.client.inside(this.program('deliver'), ...args.map(String))
    const child = this.own(spawn(command, rest, { stdio: ['pipe', 'pipe', 'inherit'] }))
    let output = ''
    const ready = new Promise<void>((resolve) => {
      child.stdout.on('data', (chunk) => {
        output += String(chunk)
        resolve()
      })
    })
    const done = once(child, 'close').then(([code]) => {
      if (code !== 0) throw new LatticeError('backend_failed', `A client failed: ${args.join(' ')}`)
      return JSON.parse(output.slice(output.indexOf('\n'))) as Measured
    })
    await Promise.race([ready, done])
    return { begin: () => child.stdin.end('\n'), done }
  }

  /** It ends with the world at the latest. */
  private own<Child extends ChildProcess>(child: Child): Child {
    this.children.add(child)
    child.once('exit', () => this.children.delete(child))
    return child
  }

  private program(name: (typeof SOURCES)[number]): string {
    return join(this.folder, name)
  }

  /** Starts a C peer on the server's core; the function ends it. */
  async peer(kind: string, port: number): Promise<() => Promise<void>> {
    const [command, rest] = this.server.inside(this.program('clients'), 'serve', kind, String(port))
    const child = this.own(spawn(command, rest, { stdio: ['ignore', 'pipe', 'inherit'] }))
    await once(child.stdout, 'data')
    return async () => {
      child.kill('SIGTERM')
      await once(child, 'exit')
    }
  }

  [Symbol.dispose](): void {
    for (const child of this.children) child.kill('SIGKILL')
    for (const end of [this.client, this.server]) {
      end.end()
      try {
        ip('netns', 'del', end.namespace)
      } catch {
        // It was never made.
      }
    }
    rmSync(this.folder, { recursive: true, force: true })
  }
}

function missing(what: string, todo: string, cause?: unknown): LatticeError {
  return new LatticeError('backend_unavailable', `The bench needs ${what}.`, { todo, cause })
}
