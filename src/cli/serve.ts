// Owns `lattice serve`: from flags to a listening server, what it prints, and how it ends.

import { Command } from 'commander'
import { createServer } from 'node:net'
import { LatticeError } from '../errors.ts'
import {
  MAX_QUEUE_DEFAULT,
  MAX_SEQUENCES_DEFAULT,
  STEP_TOKENS_GPU,
  STEP_TOKENS_MAX_DEFAULT,
} from '../limits.ts'
import { info, warn } from '../log.ts'
import type { Disconnects } from '../net/disconnects.ts'
import { isLoopback } from '../net/interface.ts'
import type { NetService } from '../net/net-service.ts'
import type { JoinedReplica } from '../net/joined-replica.ts'
import {
  addNetOptions,
  chooseNet,
  type JoinChoice,
  type NetChoice,
  type NetOptions,
} from './net-options.ts'
import { attachedLines } from './net-page.ts'
import { addEngineOptions, type EngineOptions } from './options.ts'
import { collect, collectOrigin, parseCount } from './parse.ts'
import { EXIT_INTERRUPTED } from './report.ts'
import { openSession, type Session } from './session.ts'

interface ServeOptions extends EngineOptions, NetOptions {
  host: string
  port: number
  apiKey?: string[]
  allowOrigin?: string[]
  sharePort?: true
  kernelDisconnect?: true
  maxSequences: number
  maxQueue: number
  stepTokens?: number
}

/**
 * One Ctrl-C arrives up to three times: from the terminal, from npm and from the bootstrap. Only
 * a signal that comes later than this is a second wish.
 */
const ONE_SIGNAL_MS = 500

export function serveCommand(): Command {
  const command = new Command('serve')
    .description(
      'Answers the OpenAI API over HTTP. SIGTERM or Ctrl-C ends it after the last answer.',
    )
    .optionsGroup('Server:')
    .option('--host <ADDRESS>', 'address to listen on; 0.0.0.0 is every one', '127.0.0.1')
    .option(
      '-p, --port <PORT>',
      'port to listen on; 0 takes a free one',
      parseCount(0, 65535),
      8080,
    )
    .option('--api-key <KEY>', 'ask for this key; may be repeated (or LATTICE_API_KEY)', collect)
    .option(
      '--allow-origin <ORIGIN>',
      'let web pages from there ask, such as http://localhost:3000, or * for all; may be repeated',
      collectOrigin,
    )
    .option('--share-port', 'beside other servers: a connection goes to who has the least to do')
    .option(
      '--kernel-disconnect',
      'a client that goes ends its request within one step, however busy the server is; needs' +
        ' root and cgroup v2',
    )
    .optionsGroup('Load:')
    .option(
      '--max-sequences <N>',
      'sequences that run at once',
      parseCount(1),
      MAX_SEQUENCES_DEFAULT,
    )
    .option(
      '--max-queue <N>',
      'sequences that wait; beyond it, 429',
      parseCount(0),
      MAX_QUEUE_DEFAULT,
    )
    .option(
      '--step-tokens <N>',
      'tokens of one engine step' +
        ` (default: ${STEP_TOKENS_MAX_DEFAULT}, on a GPU ${STEP_TOKENS_GPU})`,
      parseCount(1),
    )
  return addNetOptions(addEngineOptions(command)).action(serve)
}

async function serve(options: ServeOptions): Promise<void> {
  const apiKeys = chooseApiKeys(options.apiKey, process.env['LATTICE_API_KEY'])
  // Said now, not after the model has been fetched and loaded.
  const [chosen] = await Promise.all([
    chooseNet(options),
    options.sharePort ? undefined : assertPortIsFree(options.host, options.port),
  ])
  const disconnects = options.kernelDisconnect && (await openDisconnects())
  const session = await openSession(options, {
    ...options,
    ...(disconnects && { disconnects: disconnects.ring }),
  })
  for (const line of session.report) print(line)
  const net = chosen && 'tenants' in chosen ? await openNet(chosen, session, options) : undefined
  const joined = chosen && 'join' in chosen ? await join(chosen, session, options) : undefined
  const { startServer } = await import('../server/server.ts')
  const server = await startServer({
    engine: session.engine,
    tokenizer: session.tokenizer,
    template: session.template,
    host: options.host,
    port: options.port,
    apiKeys,
    allowOrigins: options.allowOrigin ?? [],
    sharePort: options.sharePort ?? false,
    net,
    kernelDisconnect: disconnects !== undefined,
  })
  const asked = untilAsked()
  if (apiKeys.length === 0 && !isLoopback(options.host)) {
    warn(`anyone who reaches ${options.host} can use this server: consider --api-key`)
  }
  print(`Serving ${session.modelId} on ${server.url}, ready in ${secondsSinceStart()} s`)
  const withKey = apiKeys.length > 0 ? ', with a key in LATTICE_API_KEY' : ''
  print(`Try it${withKey}:\n  ${curlLine(session, server.url, apiKeys.length > 0)}`)
  await asked
  print('Draining: running requests end first; a second signal ends them now.')
  net?.refuse()
  joined?.refuse()
  await server.drain()
  await net?.close()
  await joined?.close()
  await server.close()
  await session.engine.close()
  disconnects?.close()
}

/** @throws LatticeError `net_refused`, `backend_unavailable` */
async function openDisconnects(): Promise<Disconnects> {
  const { Disconnects } = await import('../net/disconnects.ts')
  return Disconnects.open()
}

/** @throws LatticeError what keeps the interface from being attached; then the engine is closed */
async function openNet(
  { tenants, attach, share }: NetChoice,
  { engine, tokenizer, template, path: modelPath }: Session,
  { maxSequences, maxQueue, prefixCache, host }: ServeOptions,
): Promise<NetService> {
  const { NetService } = await import('../net/net-service.ts')
  const maxRunning = maxSequences + maxQueue
  const load = (): number => maxRunning - engine.queueRoom()
  const limits = { tenants, share, load, maxRunning, publishes: prefixCache !== undefined }
  const model = { engine, tokenizer, template, modelPath }
  const net = new NetService({ ...model, ...limits, host, warn, log: info })
  try {
    if (attach) print(attachedLines(await net.attach(attach)))
    return net
  } catch (thrown) {
    await engine.close()
    throw thrown
  }
}

/** @throws LatticeError what keeps it from joining; then the engine is closed */
async function join(
  { join: path }: JoinChoice,
  { engine, tokenizer, template }: Session,
  { maxSequences, maxQueue, prefixCache }: ServeOptions,
): Promise<JoinedReplica> {
  const { JoinedReplica } = await import('../net/joined-replica.ts')
  const load = (): number => maxSequences + maxQueue - engine.queueRoom()
  const publishes = prefixCache !== undefined
  const options = { path, engine, tokenizer, template, load, publishes, warn }
  try {
    const joined = await JoinedReplica.join(options)
    print(`Datagrams through the server that shares ${path}`)
    return joined
  } catch (thrown) {
    await engine.close()
    throw thrown
  }
}

/** Every key that is accepted; none lets everyone in. */
export function chooseApiKeys(
  flags: readonly string[] = [],
  variable: string | undefined,
): string[] {
  const keys = variable === undefined ? [...flags] : [...flags, variable]
  if (keys.every((key) => key.trim() !== '')) return keys
  throw new LatticeError('usage', 'An API key is empty, which would let everyone in.', {
    todo: 'Give --api-key a value; unset LATTICE_API_KEY to serve without keys.',
  })
}

function assertPortIsFree(host: string, port: number): Promise<void> {
  return new Promise((resolve, reject) => {
    const probe = createServer()
    probe.once('error', (error) => reject(listenError(error, host, port)))
    probe.listen(port, host, () => probe.close(() => resolve()))
  })
}

function listenError(thrown: unknown, host: string, port: number): unknown {
  const code = (thrown as NodeJS.ErrnoException | undefined)?.code
  const known: Record<string, [what: string, todo: string]> = {
    EADDRINUSE: [
      `Port ${port} on ${host} is in use.`,
      `Choose another with --port ${port < 65535 ? port + 1 : 8080}, or stop what listens there.`,
    ],
    EACCES: [`Port ${port} needs privileges.`, 'Choose a port above 1023 with --port.'],
    EADDRNOTAVAIL: [`${host} is no address of this machine.`, 'Use --host 127.0.0.1 or 0.0.0.0.'],
    ENOTFOUND: [`${host} is no known host name.`, 'Use --host 127.0.0.1 or 0.0.0.0.'],
  }
  const found = code === undefined ? undefined : known[code]
  if (found === undefined) return thrown
  return new LatticeError('usage', found[0], { todo: found[1], cause: thrown })
}

/** Since `npm start` was typed, if that is what started us. */
function secondsSinceStart(): string {
  const startedMs = Number(process.env['LATTICE_STARTED_MS']) || performance.timeOrigin
  return ((performance.timeOrigin + performance.now() - startedMs) / 1000).toFixed(2)
}

/** A request that works when pasted into a shell on this machine. */
function curlLine({ modelId, template }: Session, url: string, needsKey: boolean): string {
  const base = url.replace('//0.0.0.0', '//127.0.0.1').replace('//[::]', '//[::1]')
  const [path, body] =
    template === undefined
      ? ['/v1/completions', { model: modelId, prompt: 'Once upon a time' }]
      : [
          '/v1/chat/completions',
          { model: modelId, messages: [{ role: 'user', content: 'Why is the sky blue?' }] },
        ]
  const json = JSON.stringify({ ...body, max_tokens: 100, stream: true }).replaceAll("'", `'\\''`)
  const key = needsKey ? ' -H "authorization: Bearer $LATTICE_API_KEY"' : ''
  return `curl -N ${base}${path}${key} -H 'content-type: application/json' -d '${json}'`
}

/** Resolves at the first SIGTERM or SIGINT; the second ends the process at once. */
export function untilAsked(): Promise<void> {
  return new Promise((resolve) => {
    let firstAt: number | undefined
    const onSignal = (): void => {
      if (firstAt === undefined) {
        firstAt = performance.now()
        resolve()
      } else if (performance.now() - firstAt > ONE_SIGNAL_MS) {
        process.exit(EXIT_INTERRUPTED)
      }
    }
    process.on('SIGINT', onSignal)
    process.on('SIGTERM', onSignal)
  })
}

function print(line: string): void {
  process.stdout.write(`${line}\n`)
}
