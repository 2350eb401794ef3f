// Owns `npm test`: types, lint and format first, since they take a second, then every test.
// With file patterns or node:test flags it runs the matching tests only.

import { spawn } from 'node:child_process'
import { resolveModel } from '../src/model/registry.ts'
import { globSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { installSystemPackages } from './system-packages.ts'

const TESTS = ['src/**/*.test.ts', 'test/**/*.test.ts']
/** A test that hangs fails after this long, with its name, instead of stopping CI mute. */
const TEST_TIMEOUT_MS = 300_000
/** All of them take two minutes; a file that blocks its own timers must not stop CI either. */
const RUN_TIMEOUT_MS = 2_400_000

const flags = process.argv.slice(2).filter((argument) => argument.startsWith('-'))
const patterns = process.argv.slice(2).filter((argument) => !argument.startsWith('-'))

if (patterns.length + flags.length === 0) {
  const checks = await Promise.all([
    check('types', 'node_modules/.bin/tsc', ['-p', '.']),
    check('lint', 'node_modules/.bin/oxlint', ['--deny-warnings']),
    check('format', 'node_modules/.bin/oxfmt', ['--check', '.']),
  ])
  if (checks.includes(false)) process.exit(1)
}

// Tests on the real model skip, and say so, where it cannot be had.
if (process.env['LATTICE_TEST_MODEL'] === undefined) {
  try {
    process.env['LATTICE_TEST_MODEL'] = (await resolveModel(undefined)).path
  } catch (thrown) {
    console.log(`tests without the default model: ${String(thrown)}`)
  }
}

const files = globSync(TESTS).filter(
  (file) => patterns.length === 0 || patterns.some((pattern) => file.includes(pattern)),
)
if (files.length === 0) {
  process.stderr.write(`error: no test file's path contains ${patterns.join(' or ')}\n`)
  process.exit(2)
}
if (files.some((file) => /(^|\/)net\//.test(file))) installSystemPackages()
const tests = spawn(
  process.execPath,
  [
    '--test',
    '--test-reporter=spec',
    `--test-concurrency=${Math.max(2, availableParallelism() - 1)}`,
    `--test-timeout=${TEST_TIMEOUT_MS}`,
    '--import=./tools/left-open.ts',
    ...flags,
    ...files.toSorted(),
  ],
  {
    stdio: 'inherit',
    env: { LATTICE_LOG: 'off', ...process.env },
    timeout: RUN_TIMEOUT_MS,
    killSignal: 'SIGKILL',
  },
)
for (const signal of ['SIGINT', 'SIGTERM'] as const) process.on(signal, () => tests.kill(signal))
tests.on('exit', (code) => process.exit(code ?? 1))

/** Runs one check in silence; says that it passed, or shows all it said. */
async function check(name: string, script: string, argv: string[]): Promise<boolean> {
  const started = performance.now()
  const child = spawn(process.execPath, [script, ...argv], { stdio: ['ignore', 'pipe', 'pipe'] })
  const output: Buffer[] = []
  child.stdout.on('data', (chunk: Buffer) => output.push(chunk))
  child.stderr.on('data', (chunk: Buffer) => output.push(chunk))
  const code = await new Promise<number | null>((resolve) => child.on('close', resolve))
  const seconds = ((performance.now() - started) / 1000).toFixed(1)
  if (code === 0) console.log(`✔ ${name} (${seconds} s)`)
  else console.log(`✖ ${name}\n${Buffer.concat(output).toString()}`)
  return code === 0
}
