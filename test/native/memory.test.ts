// Catches a frame by which somebody reads or writes beyond it, beyond a prompt or a table, or keeps
// memory: the native intake under the sanitizers.

import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { test } from 'node:test'
import { temporaryDirectory } from '../support/temporary.ts'

const ROOT = fileURLToPath(new URL('../../', import.meta.url))
const SOURCES = [
  'test/native/fuzz.c',
  ...['intake', 'frames', 'waiting'].map((name) => `native/${name}.c`),
]
const SANITIZERS = ['-fsanitize=address,undefined', '-fno-sanitize-recover=undefined']
const FRAMES = 200_000
const SEED = process.env['LATTICE_FUZZ_SEED'] ?? '1'

/** Undefined if none has the sanitizers. */
function compilerWithSanitizers(folder: string): string | undefined {
  const argv = [...SANITIZERS, '-x', 'c', '-', '-o', join(folder, 'nothing')]
  return ['clang-19', 'gcc'].find((compiler) => {
    try {
      execFileSync(compiler, argv, { input: 'int main(void) { return 0; }', stdio: 'pipe' })
      return true
    } catch {
      return false
    }
  })
}

test(`a frame reaches beyond its memory (seed ${SEED})`, (t) => {
  const folder = temporaryDirectory('native')
  const compiler = compilerWithSanitizers(folder)
  if (!compiler) return t.skip('SKIPPED: no compiler with sanitizers is installed')
  const program = join(folder, 'fuzz')
  execFileSync(compiler, ['-g', '-O1', ...SANITIZERS, ...SOURCES, '-o', program], { cwd: ROOT })
  const said = execFileSync(program, [SEED, `${FRAMES}`], { encoding: 'utf8' })
  t.diagnostic(said.trim())
  const [arrived, failed, sent] = [...said.matchAll(/\d+/g)].map(Number)
  assert.ok(arrived! > 5000 && failed! > 5000 && sent! > 20_000, said)
})
