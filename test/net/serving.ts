// Owns `lattice` in the hosts of a test: a server with a small model in one namespace, other
// commands in the other.

import { type ChildProcess, execFile, spawn } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { fileURLToPath } from 'node:url'
import { temporaryDirectory } from '../support/temporary.ts'
import { tinyLlama, writeTinyGguf } from '../support/tiny-gguf.ts'
import { inNamespace, type TwoHosts, twoHosts } from './namespaces.ts'

export const MAIN = fileURLToPath(new URL('../../src/main.ts', import.meta.url))
export const KEY = '000102030405060708090a0b0c0d0e0f'
export const URL_OF_SERVER = 'http://127.0.0.1:8099'
/** Tenant 7's way to ask. */
export const AS_TENANT = { LATTICE_TENANT: '7', LATTICE_TENANT_KEY: KEY }
export const SEVEN = {
  tenant: 7,
  name: 'seven',
  keys: [KEY],
  tokens_per_second: 1e6,
  burst_tokens: 1e6,
  max_running: 4,
}
const CHAT_TEMPLATE =
  "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"

export interface Ended {
  code: number | null
  stdout: string
  stderr: string
}

/** Runs `lattice` in a namespace, to its end. */
export function lattice(namespace: string, args: string[], env: object = {}): Promise<Ended> {
  const [command, argv] = inNamespace(namespace, MAIN, ...args)
  return new Promise((resolve) => {
    const options = { env: { ...process.env, ...env } }
    const child = execFile(command, argv, options, (_error, stdout, stderr) => {
      resolve({ code: child.exitCode, stdout, stderr })
    })
    child.stdin?.end()
  })
}

export interface Running {
  child: ChildProcess
  said: () => string
  ended: Promise<number | null>
}

/** Starts `lattice` in a namespace; resolves when it has said something that matches. */
export async function start(
  t: TestContext,
  namespace: string,
  args: string[],
  ready: RegExp,
  env: object = {},
): Promise<Running> {
  const [command, argv] = inNamespace(namespace, MAIN, ...args)
  const child = spawn(command, argv, {
    stdio: ['ignore', 'pipe', 'pipe'],
    // What it would say to anyone, whoever runs the tests.
    env: { ...process.env, LATTICE_LOG: undefined, ...env },
  })
  t.after(() => void child.kill('SIGKILL'))
  let text = ''
  const ended = new Promise<number | null>((resolve) => child.on('exit', resolve))
  await new Promise<void>((resolve, reject) => {
    const hear = (chunk: Buffer): void => {
      text += String(chunk)
      if (ready.test(text)) resolve()
    }
    child.stdout.on('data', hear)
    child.stderr.on('data', hear)
    void ended.then(() => reject(new Error(`it ended: ${text}`)))
  })
  return { child, said: () => text, ended }
}

export interface Serving extends Running {
  two: TwoHosts
}

export interface ServingOptions {
  tenants?: object[]
  flags?: string[]
  contextLength?: number
}

/** A server with a small model in the second of two hosts. */
export async function serving(
  t: TestContext,
  { tenants = [SEVEN], flags = [], contextLength = 512 }: ServingOptions = {},
): Promise<Serving> {
  const file = join(temporaryDirectory('net'), 'tenants.jsonc')
  writeFileSync(file, JSON.stringify(tenants))
  const metadata = {
    'llama.context_length': contextLength,
    'tokenizer.chat_template': CHAT_TEMPLATE,
  }
  const model = writeTinyGguf(tinyLlama(1, metadata))
  const two = await twoHosts()
  // After the server: hooks run in the order in which they were made.
  const server = ['serve', '--model', model, '--threads', '1', '--port', '8099']
  try {
    const argv = [...server, '--net-tenants', file, ...flags]
    return { two, ...(await start(t, two.server.namespace, argv, /ready in/)) }
  } finally {
    t.after(() => two.remove())
  }
}
