import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { existsSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { temporaryDirectory } from '../../test/support/temporary.ts'
import { tinyLlama, writeTinyGguf } from '../../test/support/tiny-gguf.ts'
import type { Manifest } from '../model/store.ts'
import { age } from './ls.ts'

const home = temporaryDirectory('cli')

const PROGRAM = `
  import { Command } from 'commander'
  import { lsCommand } from '${new URL('./ls.ts', import.meta.url).href}'
  import { pullCommand } from '${new URL('./pull.ts', import.meta.url).href}'
  import { rmCommand } from '${new URL('./rm.ts', import.meta.url).href}'
  const program = new Command().addCommand(lsCommand()).addCommand(pullCommand())
  try {
    await program.addCommand(rmCommand()).parseAsync(process.argv.slice(1), { from: 'user' })
  } catch (thrown) {
    console.error(thrown.code)
    process.exitCode = thrown.exitCode
  }`

/** What a command writes to stdout; its exit code must be as said. */
function run(args: readonly string[], exit = 0): string {
  const settings = ['--input-type=module', '-e', PROGRAM, '--', ...args]
  const env = { ...process.env, LATTICE_HOME: home, LATTICE_LOG: 'off' }
  const done = spawnSync(process.execPath, settings, {
    env,
    encoding: 'utf8',
    cwd: import.meta.dirname,
  })
  assert.equal(done.status, exit, done.stderr)
  return done.stdout
}

test('pull, ls and rm show the same model, for people and for scripts', () => {
  assert.match(run(['ls']), /^No models in .*lattice pull/)
  assert.equal(run(['ls', '--json']), '[]\n')
  const path = writeTinyGguf(tinyLlama(), 'Mine.gguf')
  const pulled = JSON.parse(run(['pull', path, '--name', 'own', '--json'])) as Manifest
  assert.deepEqual([pulled.name, pulled.source, pulled.inPlace], ['own', path, true])
  const lines = run(['ls']).split('\n')
  assert.match(lines[0] ?? '', /^NAME +SIZE +FORMAT +ARCH +QUANT +SOURCE +PULLED$/)
  assert.match(lines[1] ?? '', /^own +\d+ kB +gguf +llama +F32 +\/.*Mine.gguf +just now$/)
  const [listed] = JSON.parse(run(['ls', '--json'])) as (Manifest & {
    paths: string[]
  })[]
  assert.deepEqual([listed?.name, listed?.paths], ['own', [path]])
  assert.equal(run(['rm', 'own', '--json']), '{"removed":["own"]}\n')
  assert.ok(existsSync(path))
  assert.equal(run(['ls', '--json']), '[]\n')
})

test('rm of what is not there ends with the code for not found', () => {
  assert.equal(run(['rm', 'nothing', '--json'], 3), '{"removed":[]}\n')
})

test('a model that cannot be run is listed, with question marks', () => {
  const path = join(home, 'broken.gguf')
  writeFileSync(path, 'GGUF, but not really')
  run(['pull', path, '--json'])
  assert.match(run(['ls']), /broken +20 B +\? +\? +\?/)
})

test('ages are told in the largest unit that fits', () => {
  const now = Date.parse('2026-01-10T00:00:00Z')
  const shown = [
    '2026-01-09T23:59:30Z',
    '2026-01-09T23:58:00Z',
    '2026-01-09T21:00:00Z',
    '2026-01-09T00:00:00Z',
    '2025-12-31T00:00:00Z',
  ]
  assert.deepEqual(
    shown.map((date) => age(date, now)),
    ['just now', '2 minutes ago', '3 hours ago', '1 day ago', '10 days ago'],
  )
})
