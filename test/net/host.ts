// Owns one host of a test network: a process in a network namespace that does what the test asks of
// it by messages. A test starts it through namespaces.ts.

import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { connect, createServer } from 'node:net'
import { ATTACH, attachedPrograms } from '../../src/ffi/bpf-link.ts'
import { BpfObject } from '../../src/ffi/libbpf.ts'
import { interfaceIndex } from '../../src/ffi/xdp-socket.ts'
import { type ClientOptions, type GenerateOptions, LatticeClient } from '../../src/net/client.ts'
import type { LatticeError } from '../../src/errors.ts'
import { NetService } from '../../src/net/net-service.ts'
import type { DatagramTenant } from '../../src/net/tenants.ts'
import { FakeEngine } from '../support/fake-engine.ts'
import { fakeTokenizer } from '../support/fake-tokenizer.ts'
import { relay, type World } from './relay.ts'

/** What an answer came to, or how it failed. */
export interface Asked {
  text: string
  tokens: number
  reason?: string
  usage?: { promptTokens: number; cachedTokens: number; outputTokens: number }
  /** Code of the error, and the server's code in it. */
  error?: string
  code?: unknown
}

/** What a server host is to be. */
export interface ServeOptions {
  interface: string
  tenants: DatagramTenant[]
  stepMs?: number
  /** The answer is this text so often, then the prompt's length. */
  reply: { text: string; times: number }
  mode?: 'native' | 'generic' | 'zerocopy'
  maxRunning?: number
}

let service: NetService | undefined
let engine: FakeEngine | undefined

/** What a test can ask for. Each survives a message between processes. */
export const COMMANDS = {
  /** XDP_TX reaches a veth only if it has a program of its own. */
  pass(name: string): void {
    const object = new BpfObject(readFileSync(new URL('../../bpf/testing.o', import.meta.url)))
    object.program('pass').attachXdp(interfaceIndex(name), 'native')
  },

  async serve({ reply, stepMs = 0, tenants, maxRunning = 1000, ...options }: ServeOptions) {
    engine = new FakeEngine({
      contextLength: 1 << 21,
      stepMs,
      reply: ({ prompt }) => reply.text.repeat(reply.times) + prompt.length,
    })
    const tokenizer = fakeTokenizer()
    const warn = (line: string): void => void process.stderr.write(`${line}\n`)
    service = new NetService({ engine, tokenizer, template: undefined, tenants, maxRunning, warn })
    return await service.attach({
      name: options.interface,
      queue: undefined,
      force: false,
      mode: options.mode ?? 'native',
      allowGeneric: false,
      busyPollBudget: 0,
      port: 7411,
    })
  },

  status: () => service?.status(),

  /** How many programs see what an interface sends. */
  accountants: (name: string) => attachedPrograms(interfaceIndex(name), ATTACH.tcxEgress),

  /** How many aborts the engine has seen, and what runs there. */
  async engine() {
    const snapshot = await engine?.snapshot()
    return { aborts: engine?.aborts.length, running: snapshot?.running }
  },

  async stop(): Promise<void> {
    await service?.close()
    await engine?.close()
  },

  /** @param cancelAfter aborts once so many characters have come */
  async ask(
    client: ClientOptions,
    request: GenerateOptions,
    cancelAfter = Infinity,
  ): Promise<Asked> {
    const asked: Asked = { text: '', tokens: 0 }
    const abort = new AbortController()
    try {
      const answer = new LatticeClient(client).generate({ ...request, signal: abort.signal })
      for (;;) {
        const { done, value } = await answer.next()
        if (done) {
          const { reason, ...usage } = value
          return { ...asked, reason, usage }
        }
        asked.text += value.text
        asked.tokens += value.tokens.length
        if (asked.text.length >= cancelAfter) abort.abort()
      }
    } catch (thrown) {
      const { code, details } = thrown as LatticeError
      return { ...asked, error: code ?? String(thrown), code: details?.['code'] }
    }
  },

  /** A bad network between a client and a server: a port of this host that leads there. */
  relay: (world: World, address: string, port: number) => relay(world, address, port),

  /** A TCP server that answers what it was sent with its hash. */
  listen(port: number): Promise<void> {
    const server = createServer({ allowHalfOpen: true }, (socket) => {
      const hash = createHash('sha256')
      socket.on('data', (bytes) => hash.update(bytes))
      socket.on('end', () => socket.end(hash.digest('hex')))
    })
    return new Promise((resolve) => server.listen(port, resolve))
  },

  /** Sends bytes over TCP; returns the hash that came back. */
  async transfer(address: string, port: number, bytes: Uint8Array): Promise<string> {
    const socket = connect(port, address)
    socket.end(bytes)
    let answer = ''
    for await (const chunk of socket) answer += String(chunk)
    return answer
  },
}

export interface Call {
  id: number
  command: keyof typeof COMMANDS
  args: unknown[]
}

export interface Reply {
  id: number
  value?: unknown
  error?: string
}

if (import.meta.main) {
  process.on('message', async ({ id, command, args }: Call) => {
    try {
      const value = await (COMMANDS[command] as (...all: unknown[]) => unknown)(...args)
      process.send?.({ id, value })
    } catch (thrown) {
      process.send?.({ id, error: thrown instanceof Error ? thrown.stack : String(thrown) })
    }
  })
  // Its test is gone.
  process.on('disconnect', () => process.exit())
}
