// Owns compiling native/*.c: the object beside them is committed, so that nobody needs a compiler
// to run it, and a test compiles it again and compares.
//
//   node tools/native.ts [FOLDER]

import { execFileSync } from 'node:child_process'
import { globSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const ROOT = fileURLToPath(new URL('../', import.meta.url))
/** Other versions write other instructions, or put them elsewhere. */
const CLANG = 'clang-19'
const LINKER = 'GNU ld (GNU Binutils for Debian) 2.40'
export const OBJECT = 'ring.so'

if (import.meta.main) compile(process.argv[2] ?? join(ROOT, 'native'))

/** Why the same object cannot be made here; undefined if it can. */
export function missing(): string | undefined {
  if (process.arch !== 'x64') return 'an x86-64 machine'
  if (versionOf(CLANG) === undefined) return CLANG
  return versionOf('ld') === LINKER ? undefined : LINKER
}

/** Writes the object into a folder. */
export function compile(folder: string): void {
  const scratch = mkdtempSync(join(tmpdir(), 'lattice-native-'))
  try {
    const objects = globSync('native/*.c', { cwd: ROOT })
      .toSorted()
      .map((source) => {
        const object = join(scratch, `${basename(source, '.c')}.o`)
        const flags = ['-O2', '-std=gnu17', '-fPIC', '-fvisibility=hidden', '-fno-ident']
        const argv = [...flags, '-Wall', '-Wextra', '-Werror', '-c', source, '-o', object]
        run(CLANG, ['--target=x86_64-linux-gnu', ...argv])
        return object
      })
    // The C library is there already: its process has it.
    const bare = [
      '-nostdlib',
      '-Wl,--build-id=none',
      '-Wl,--strip-all',
      '-Wl,-z,noseparate-code,-z,now',
    ]
    run(CLANG, ['-shared', '-fuse-ld=bfd', ...bare, ...objects, '-o', join(folder, OBJECT)])
  } finally {
    rmSync(scratch, { recursive: true })
  }
}

function run(program: string, argv: readonly string[]): void {
  execFileSync(program, argv, { cwd: ROOT, stdio: ['ignore', 'inherit', 'inherit'] })
}

/** The first line of what it says; undefined if it is not there. */
function versionOf(program: string): string | undefined {
  try {
    return execFileSync(program, ['--version'], { encoding: 'utf8' }).split('\n')[0]
  } catch {
    return undefined
  }
}
