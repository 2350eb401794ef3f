// Owns compiling bpf/*.bpf.c: the objects beside them are committed, so that nobody needs clang to
// run them, and a test compiles them again and compares.
//
//   node tools/bpf.ts [FOLDER]

import { execFileSync } from 'node:child_process'
import { globSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const ROOT = fileURLToPath(new URL('../', import.meta.url))
/** Other versions write other instructions. */
export const CLANG = 'clang-19'
const STRIP = 'llvm-strip-19'

if (import.meta.main) compile(process.argv[2] ?? join(ROOT, 'bpf'))

/** Whether the compiler is there. */
export function canCompile(): boolean {
  try {
    execFileSync(CLANG, ['--version'], { stdio: 'ignore' })
    return true
  } catch {
    return false
  }
}

/** Writes an object for each program into a folder; returns their names. */
export function compile(folder: string): string[] {
  const scratch = mkdtempSync(join(tmpdir(), 'lattice-bpf-'))
  try {
    return globSync('bpf/*.bpf.c', { cwd: ROOT })
      .toSorted()
      .map((source) => {
        const name = `${basename(source, '.bpf.c')}.o`
        const whole = join(scratch, name)
        const flags = ['-O2', '-g', '-target', 'bpf', '-mcpu=v3', '-Wall', '-Werror']
        // The object names its sources for the verifier's log: the same wherever it was compiled.
        const places = [`-ffile-prefix-map=${ROOT}=`, '-fdebug-compilation-dir=.']
        const headers = ['-I/usr/include/x86_64-linux-gnu']
        const argv = [...flags, ...places, ...headers, '-c', source, '-o', whole]
        execFileSync(CLANG, argv, { cwd: ROOT, stdio: ['ignore', 'inherit', 'inherit'] })
        execFileSync(STRIP, ['-g', whole, '-o', join(folder, name)], { cwd: ROOT })
        return name
      })
  } finally {
    rmSync(scratch, { recursive: true })
  }
}
