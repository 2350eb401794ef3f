// Owns `lattice run --server`: the prompt goes to a server over datagrams, its answer to stdout.

import { readFileSync } from 'node:fs'
import { LatticeError } from '../errors.ts'
import type { GenerateResult, TextDelta } from '../net/client.ts'
import { PROTOCOL_PORT } from '../net/protocol.ts'
import { parseKey } from '../net/tenants.ts'
import { ANSWER_TOKENS_DEFAULT } from './options.ts'

export interface RemoteOptions {
  server: string
  tenant?: number
  tenantKeyFile?: string
  system?: string
  raw?: boolean
  model?: string
  maxTokens?: number
  temperature: number
  topP: number
  seed?: number
}

/** Options of `run` that the protocol carries; the others are a server's business. */
const CARRIED = new Set([
  'server',
  'tenant',
  'tenantKeyFile',
  'system',
  'raw',
  'json',
  'verbose',
  'model',
  'maxTokens',
  'temperature',
  'topP',
  'seed',
])

/** @throws LatticeError `usage` for an option that was given and would have no effect */
export function checkCarried(given: readonly string[]): void {
  const lost = given.find((name) => !CARRIED.has(name))
  if (lost === undefined) return
  const flag = `--${lost.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`
  throw new LatticeError('usage', `${flag} has no effect with --server.`, {
    todo: 'Leave it out: the server decides it, or the protocol does not carry it.',
  })
}

/**
 * Streams one answer to `write`; `interrupt` ends it early, with reason "abort".
 * @throws LatticeError `usage`, and as `LatticeClient.generate` does
 */
export async function answerRemotely(
  prompt: string,
  options: RemoteOptions,
  write: (text: string) => void,
  interrupt: AbortSignal,
): Promise<GenerateResult & { text: string; ttftMs: number; totalMs: number }> {
  const { LatticeClient } = await import('../net/client.ts')
  const client = new LatticeClient({
    ...parseServer(options.server),
    tenant: chooseTenant(options.tenant),
    key: chooseKey(options.tenantKeyFile),
  })
  const { system, raw, model, maxTokens = ANSWER_TOKENS_DEFAULT, temperature, topP, seed } = options
  const messages = [{ role: 'user', content: prompt }]
  if (system !== undefined) messages.unshift({ role: 'system', content: system })
  const started = performance.now()
  const answer: AsyncGenerator<TextDelta, GenerateResult> = client.generate({
    prompt: raw ? prompt : messages,
    maxTokens,
    temperature,
    topP,
    signal: interrupt,
    ...(model === undefined ? {} : { model }),
    ...(seed === undefined ? {} : { seed }),
  })
  let text = ''
  let ttftMs: number | undefined
  for (;;) {
    const { done, value } = await answer.next()
    if (done) {
      const totalMs = performance.now() - started
      return { ...value, text, ttftMs: ttftMs ?? totalMs, totalMs }
    }
    ttftMs ??= performance.now() - started
    text += value.text
    if (value.text !== '') write(value.text)
  }
}

/** An address such as lattice://10.0.0.2:7411. */
export function parseServer(text: string, flag = '--server'): { host: string; port: number } {
  const match = /^lattice:\/\/(\[[0-9a-f:.%\w]+\]|[^/:[\]]+)(?::(\d{1,5}))?\/?$/i.exec(text)
  const port = Number(match?.[2] ?? PROTOCOL_PORT)
  if (match?.[1] && port > 0 && port < 65536) {
    return { host: match[1].replace(/^\[|\]$/g, ''), port }
  }
  throw new LatticeError('usage', `${flag} ${text} is no address of the datagram protocol.`, {
    todo: `Write one such as lattice://10.0.0.2:${PROTOCOL_PORT}.`,
  })
}

export function chooseTenant(flag: number | undefined): number {
  const variable = process.env['LATTICE_TENANT']
  const tenant = flag ?? (variable === undefined ? undefined : Number(variable))
  if (tenant !== undefined && Number.isInteger(tenant)) return tenant
  throw new LatticeError('usage', 'The server needs to know which tenant asks.', {
    todo: 'Give its number with --tenant or in LATTICE_TENANT.',
  })
}

/** Never from an argument: those can be read by every user of the machine. */
export function chooseKey(file: string | undefined): Uint8Array {
  const variable = process.env['LATTICE_TENANT_KEY']
  if (file === undefined && variable === undefined) {
    throw new LatticeError('usage', 'The server needs the tenant’s key.', {
      todo: 'Put it into LATTICE_TENANT_KEY, or into a file for --tenant-key-file.',
    })
  }
  let text = variable
  try {
    if (file !== undefined) text = readFileSync(file, 'utf8')
  } catch (cause) {
    throw new LatticeError('usage', `The key’s file ${file} cannot be read.`, {
      todo: 'Name a file that holds the key in hex or base64.',
      cause,
    })
  }
  const key = parseKey(text?.trim())
  if (key) return key
  throw new LatticeError('usage', 'The tenant’s key is not 16 bytes in hex or base64.', {
    todo: 'Copy it again from whoever runs the server.',
  })
}
